"""What this package relies on in how vLLM constrains answers: what reaches the engine, and what it may cost.

`tests/unit/server/test_vllm_grammars.py` holds a contract test for each dependency.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from f2l_vllm.server import vllm_errors
from f2l_vllm.server.chat.constraints import Constraint
from f2l_vllm.server.errors import APIError, bad_request
from f2l_vllm.server.tenants import asking_tenant

logger = logging.getLogger(__name__)


def vocabulary(engine_client: Any) -> Callable[[], str]:
    """A function that gives the tokenizer's vocabulary to xgrammar as `XgrammarBackend.__post_init__` does."""

    def write() -> str:
        import xgrammar

        size = engine_client.vllm_config.model_config.get_vocab_size()
        tokenizer = engine_client.renderer.get_tokenizer()
        text: str = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size).serialize_json()
        return text

    return write


def language(constraint: Constraint) -> tuple[str, str]:
    """The language a constraint is compiled as, and its text. Lark is told from EBNF, and choices become a grammar."""
    from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

    if constraint.kind == "choice":
        return "grammar", choice_as_grammar([str(choice) for choice in json.loads(constraint.text)])
    if constraint.kind == "grammar" and grammar_is_likely_lark(constraint.text):
        return "lark", constraint.text
    return constraint.kind, constraint.text


def constraint_of(params: Any) -> Constraint | None:
    """The constraint in vLLM's `SamplingParams.structured_outputs`; None also for "any JSON object"."""
    given = getattr(params, "structured_outputs", None)
    if given is None:
        return None
    if given.json is not None:
        return Constraint("json", given.json if isinstance(given.json, str) else json.dumps(given.json))
    if given.choice is not None:
        return Constraint("choice", json.dumps(given.choice))
    for kind in ("regex", "grammar", "structural_tag"):
        if (text := getattr(given, kind)) is not None:
            return Constraint(kind, text)
    return None


def use_xgrammar(engine_client: Any) -> bool:
    """Make xgrammar compile every constraint; return False if the operator chose another backend.

    Under `auto`, a constraint that xgrammar refuses goes to another backend, and the first request decides which
    backend the engine keeps for good (`StructuredOutputManager.grammar_init`).
    """
    config = engine_client.vllm_config.structured_outputs_config
    if config.backend == "auto":
        config.backend = "xgrammar"
    return str(config.backend) == "xgrammar"


def try_before_generating(engine_client: Any, check: Callable[[Constraint, str], Awaitable[None]]) -> None:
    """Make `engine_client.generate` check every constraint, whichever route it comes from, before the engine gets it.

    It also verifies the sampling parameters at once. vLLM would do so only after the first bytes of a stream are sent.
    """
    stock = engine_client.generate

    @functools.wraps(stock)
    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        if hasattr(sampling_params, "verify"):
            sampling_params.verify(engine_client.vllm_config.model_config, None, None, None)
        return answers(asking_tenant.get(), prompt, sampling_params, *args, **kwargs)

    async def answers(tenant: str, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import GenerationError

        constraint = constraint_of(sampling_params)
        if constraint is not None:
            await check(constraint, tenant)
        vllm_errors.note_engine_asked()
        stream = stock(prompt, sampling_params, *args, **kwargs)
        try:
            async for output in stream:
                yield output
        except GenerationError as error:
            if getattr(sampling_params, "structured_outputs", None) is None:
                raise
            failure = _not_followed()
            error.args, error.status_code = (failure.message,), failure.status
            raise error from failure
        finally:
            await stream.aclose()

    engine_client.generate = generate


def _not_followed() -> APIError:
    return bad_request(
        "structured_output_failed",
        "The answer could not be brought to an end under its constraint: no token fits any more, or matching it takes "
        "too long. Change the schema, grammar or regex.",
        "structured_outputs",
    )
