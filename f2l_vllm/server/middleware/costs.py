"""What one request may ask of the engine: caps on the fields with which one request could make all others wait.

Questions share engine steps, so all of them wait for what one request adds to sampling, matching or detokenizing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from f2l_vllm.server.errors import APIError, bad_request

MAX_ANSWERS = 128  # of one request: `n` times its prompts
MAX_BEAMS = 8  # each is a request of its own for every token
MAX_LOGPROBS = 32
MAX_MESSAGES = 4096
_LISTS = {  # entries
    "stop": 64,
    "stop_token_ids": 1024,
    "bad_words": 128,
    "allowed_token_ids": 8192,
    "logprob_token_ids": 128,
    "logit_bias": 1024,
    "tools": 128,
}
_TEXTS = {"stop": 1024, "bad_words": 1024, "request_id": 256, "session_id": 256, "cache_salt": 1024}  # characters
_NUMBERS = {
    "n": MAX_ANSWERS,
    "best_of": MAX_ANSWERS,
    "logprobs": MAX_LOGPROBS,
    "top_logprobs": MAX_LOGPROBS,
    "prompt_logprobs": MAX_LOGPROBS,
}
_PATTERNS = {"max_pattern_size": 256, "min_pattern_size": 256, "min_count": 256}  # searched for at every token


def check(body: Any) -> None:
    """Refuse a body of a generating route that asks for more than one request may.

    Raises:
        APIError: `request_too_costly`, with the field as `param`.
    """
    if not isinstance(body, dict):
        return
    for field, cap in _NUMBERS.items():
        _check_number(field, body.get(field), cap)
    for field, cap in _LISTS.items():
        if isinstance(value := body.get(field), list | dict) and len(value) > cap:
            raise _costly(field, f"{cap:,} entries")
    for field, cap in _TEXTS.items():
        values = value if isinstance(value := body.get(field), list) else [value]
        if any(isinstance(text, str) and len(text) > cap for text in values):
            raise _costly(field, f"{cap:,} characters in a string")
    if isinstance(patterns := body.get("repetition_detection"), dict):
        for field, cap in _PATTERNS.items():
            _check_number(f"repetition_detection.{field}", patterns.get(field), cap)
    for field in ("messages", "input"):
        if isinstance(value := body.get(field), list) and len(value) > MAX_MESSAGES:
            raise _costly(field, f"{MAX_MESSAGES:,} entries")
    answers = _number(body.get("n"), 1) * _prompts(body)
    if answers > MAX_ANSWERS:
        raise _costly("n", f"{MAX_ANSWERS} answers, over all prompts")
    if body.get("use_beam_search") and answers > MAX_BEAMS:
        raise _costly("n", f"{MAX_BEAMS} beams")


def _prompts(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt")
    ids = isinstance(prompt, list) and all(isinstance(one, int) for one in prompt)
    return len(prompt) if isinstance(prompt, list) and not ids else 1


def _check_number(field: str, value: Any, cap: int) -> None:
    if _number(value, 0) > cap:
        raise _costly(field, str(cap))


def _number(value: Any, default: int) -> float:
    """A number as vLLM parses it, which is lenient and accepts text too."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 32:
        return int(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _costly(field: str, cap: str) -> APIError:
    message = f"'{field}' asks for more than the {cap} that one request may: send several requests."
    return bad_request("request_too_costly", message, field)
