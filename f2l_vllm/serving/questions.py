"""What a request asks about: which video, answered how, and how long it may wait. Pure parsing, no engine."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from f2l_vllm.serving.errors import bad_request

FILE_PREFIX = "file-"
WAIT_HEADER = "x-f2l-wait"
Mode = Literal["adapter", "frames"]
_MODES = ("adapter", "frames")
_KEYS = {"mode", "wait"}


@dataclass(frozen=True)
class Options:
    """How to answer. `mode` `adapter`: from the LoRA adapter, no visual tokens; `frames`: from the frames in context.
    `wait`: seconds a question may wait for its video."""

    mode: Mode
    wait: float


def options(extra: Mapping[str, Any] | None, headers: Mapping[str, str], default_wait: float) -> Options:
    """The `f2l` object of a body and the `X-F2L-Wait` header (the body wins).

    Raises:
        APIError: `invalid_f2l_options`.
    """
    given = (extra or {}).get("f2l") or {}
    if not isinstance(given, dict) or set(given) - _KEYS:
        raise bad_request("invalid_f2l_options", f"'f2l' takes an object with the keys {sorted(_KEYS)}.", "f2l")
    mode = given.get("mode", "adapter")
    if mode not in _MODES:
        raise bad_request("invalid_f2l_options", f"f2l.mode must be one of {', '.join(_MODES)}; got {mode!r}.", "f2l")
    return Options(mode, _seconds(given.get("wait", headers.get(WAIT_HEADER)), default_wait))


def _seconds(wait: Any, default: float) -> float:
    if wait is None:
        return default
    if wait == "none":
        return 0.0
    try:
        seconds = float(wait)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        message = f"The wait must be 'none' or 0 to 3600 seconds; got {wait!r}."
        raise bad_request("invalid_f2l_options", message, "f2l.wait")
    return seconds


def file_ids(messages: list[Any]) -> list[str]:
    """The file ids that content parts name, in order, each once.

    Raises:
        APIError: a `file` part without a file id, or a `video_url` part, which this server does not fetch.
    """
    found: list[str] = []
    for part in _parts(messages):
        kind = part.get("type")
        if kind == "file":
            file = part.get("file")
            file_id = file.get("file_id") if isinstance(file, dict) else None
            if not isinstance(file_id, str) or not file_id:
                raise bad_request(
                    "invalid_request", "A 'file' part needs file.file_id, from POST /v1/files.", "messages"
                )
            if file_id not in found:
                found.append(file_id)
        elif kind == "video_url":
            raise bad_request(
                "video_url_unsupported",
                "A 'video_url' part is answered from its frames only: set f2l.mode to 'frames', or upload the video "
                "with POST /v1/files and name it in a 'file' part.",
                "messages",
            )
    return found


def without_videos(messages: list[Any]) -> list[Any]:
    """The messages without their `file` parts; a question must be left.

    Raises:
        APIError: `empty_messages`, `missing_question`.
    """
    if not messages:
        raise bad_request("empty_messages", "'messages' is empty: ask something about the video.", "messages")
    left = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [part for part in content if not _is_file(part)]
            if not parts:
                raise bad_request(
                    "missing_question", "A message holds a video and no text: ask something about it.", "messages"
                )
            message = {**message, "content": parts}
        left.append(message)
    return left


def with_frames(messages: list[Any], file_id: str, path: Path) -> list[Any]:
    """The messages with every `file` part (or, without one, the last user message) carrying the video itself."""
    url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    video = {"type": "video_url", "video_url": {"url": url}}
    replaced = [
        {**message, "content": [video if _is_file(part) else part for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    if not any(_is_file(part) for part in _parts(messages)):
        last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=None)
        if last is None:
            raise bad_request("missing_question", f"No user message asks about '{file_id}'.", "messages")
        content = replaced[last].get("content")
        text = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        replaced[last] = {**replaced[last], "content": [video, *text]}
    return replaced


def _parts(messages: list[Any]) -> list[dict[str, Any]]:
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]


def _is_file(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "file"
