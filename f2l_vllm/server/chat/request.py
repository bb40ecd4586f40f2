"""What a request asks about: which videos, answered how, and how long it may wait. Pure parsing, no engine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from f2l_vllm.catalog.stream_tables import STREAM_PREFIX
from f2l_vllm.server.chat.content import HOW_VIDEOS
from f2l_vllm.server.errors import bad_request

FILE_PREFIX = "file-"
VIDEO_PREFIXES = (FILE_PREFIX, STREAM_PREFIX)  # of ids that a model may be
# vLLM's routes that answer about videos, or refuse them with a clear error.
QUESTION_ROUTES = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"}
)
# vLLM's routes that give out or end what it stores of the answers.
STORED_ROUTES = frozenset({"/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"})
WAIT_HEADER = "x-f2l-wait"
Mode = Literal["adapter", "frames", "both"]
MODES: Sequence[Mode] = get_args(Mode)
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")  # `float` accepts the digits of every script, and underscores
_SPAN_KEYS = {"start", "end", "last"}
_KEYS = {"mode", "wait"} | _SPAN_KEYS
# The kinds of content parts that name a video, and under which keys, one of them at a time.
_NAMES: Mapping[str, Sequence[str]] = {
    "file": ("file_id", "file_data"),
    "input_file": ("file_id", "file_data", "file_url"),
    "video_url": ("url",),
}


@dataclass(frozen=True)
class Options:
    """How to answer. `mode` `adapter`: from the LoRA adapter, no visual tokens; `frames`: from the frames in context;
    `both`: from both together. `wait`: seconds a question may wait for its videos. `span`: what is meant of those
    videos that do not say it themselves."""

    mode: Mode
    wait: float
    span: Span | None = None


@dataclass(frozen=True)
class Span:
    """Seconds `start` to `end` of a video; `end` may be infinite. Of a stream, Unix seconds mean the wall clock.

    `last`: so many seconds, counted back from its end, instead.
    """

    start: float = 0.0
    end: float = math.inf
    last: float | None = None


@dataclass(frozen=True)
class Video:
    """One video that a question names, by `file_id` (or a stream's id) or by `url` (http(s) or data URI); all of it,
    or a span.

    `filename`: the client's name for the bytes of a data URI; they are the same video under any name.
    """

    file_id: str | None = None
    url: str | None = None
    span: Span | None = None
    filename: str | None = field(default=None, compare=False)

    @property
    def is_stream(self) -> bool:
        """Whether it is a stream."""
        return self.file_id is not None and self.file_id.startswith(STREAM_PREFIX)


def options(extra: Mapping[str, Any] | None, headers: Mapping[str, str], default_wait: float) -> Options:
    """The `f2l` object of a body's fields and the `X-F2L-Wait` header (the body wins).

    Raises:
        APIError: `invalid_f2l_options`, `invalid_span`.
    """
    given = (extra or {}).get("f2l") or {}
    if not isinstance(given, dict) or set(given) - _KEYS:
        raise bad_request("invalid_f2l_options", f"'f2l' takes an object with the keys {sorted(_KEYS)}.", "f2l")
    mode = given.get("mode", "adapter")
    if mode not in MODES:
        raise bad_request("invalid_f2l_options", f"f2l.mode must be one of {', '.join(MODES)}; got {mode!r}.", "f2l")
    span = _span({key: value for key, value in given.items() if key in _SPAN_KEYS}, "f2l")
    return Options(mode, _seconds(given.get("wait", headers.get(WAIT_HEADER)), default_wait), span)


def _seconds(wait: Any, default: float) -> float:
    if wait is None:
        return default
    if wait == "none":
        return 0.0
    seconds = -1.0
    if (isinstance(wait, str) and _NUMBER.fullmatch(wait)) or (isinstance(wait, int | float) and 0 <= wait <= 3600):
        seconds = float(wait)
    if not 0 <= seconds <= 3600:
        message = f"The wait must be 'none' or 0 to 3600 seconds; got {wait!r}."
        raise bad_request("invalid_f2l_options", message, "f2l.wait")
    return seconds


def videos(model: str | None, messages: Sequence[Any], span: Span | None = None) -> list[Video]:
    """The videos that a question names, in order, each once: the model, if it is a file's or a stream's id, then the
    content parts.

    Messages of every role count. If parts name the model's own video, they say which spans of it are meant. `span`:
    what is meant of videos without one of their own.

    Raises:
        APIError: `invalid_request`, `invalid_span`: a part that cannot be read, or has unknown keys.
    """
    found = list(dict.fromkeys(video for part in _parts(messages) if (video := _video(part)) is not None))
    if model is not None and model.startswith(VIDEO_PREFIXES) and model not in [video.file_id for video in found]:
        found.insert(0, Video(file_id=model))
    return [video if video.span is not None else replace(video, span=span) for video in found]


def without_videos(messages: Sequence[Any]) -> list[Any]:
    """The messages without their videos; none may be left empty.

    Raises:
        APIError: `empty_messages`, `missing_question`.
    """
    if not messages:
        raise bad_request("empty_messages", "'messages' is empty: ask something about the video.", "messages")
    left = []
    for message in messages:
        content = _content(message)
        if content is not None:
            parts = [part for part in content if _video(part) is None]
            if not parts:
                raise bad_request(
                    "missing_question", "A message holds a video and no text: ask something about it.", "messages"
                )
            if len(parts) < len(content):
                message = {**message, "content": parts}
        left.append(message)
    return left


def with_frames(messages: Sequence[Any], urls: Mapping[Video, str]) -> list[Any]:
    """The messages with each part that names a video replaced by the video itself.

    Args:
        urls: an address for each video. A video that no part names goes first in the last user message.

    Raises:
        APIError: `missing_question`: no user message.
    """
    left = dict(urls)
    replaced = []
    for message in messages:
        content = _content(message)
        if content is not None:
            parts = []
            for part in content:
                video = _video(part)
                if video is not None:
                    part = _frames(urls[video])
                    left.pop(video, None)
                parts.append(part)
            message = {**message, "content": parts}
        replaced.append(message)
    if left:
        last = max((i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"), default=None)
        if last is None:
            raise bad_request("missing_question", "No user message asks about the video.", "messages")
        content = replaced[last].get("content")
        text = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        replaced[last] = {**replaced[last], "content": [*(_frames(url) for url in left.values()), *text]}
    return replaced


def is_framed(message: Any) -> bool:
    """Whether a message holds frames."""
    return any(part.get("type") == "video_url" for part in _content(message) or () if isinstance(part, dict))


def names_a_video(value: Any) -> bool:
    """Whether the input of another route names a video anywhere."""
    if isinstance(value, dict):
        if value.get("type") in tuple(_NAMES) or str(value.get("file_id")).startswith(VIDEO_PREFIXES):
            return True
        return any(names_a_video(inner) for inner in value.values())
    return isinstance(value, list) and any(names_a_video(inner) for inner in value)


def _frames(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def _content(message: Any) -> list[Any] | None:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) and content else None


def _parts(messages: Sequence[Any]) -> list[Any]:
    return [part for message in messages for part in _content(message) or ()]


def _video(part: Any) -> Video | None:
    """The video that a content part names; None for a part that names none."""
    if not isinstance(part, dict):
        return None
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _NAMES:
        return None
    inner = {key: part[key] for key in part if key != "type"} if kind == "input_file" else part.get(kind)
    if kind == "video_url" and isinstance(inner, str):
        inner = {"url": inner}
    given = {key: value for key, value in inner.items() if value is not None} if isinstance(inner, dict) else {}
    name = next((name for name in _NAMES[kind] if name in given), _NAMES[kind][0])
    address, filename = given.get(name), given.get("filename")
    unknown = set(given) - {name, "f2l", "filename"} if address else set()
    if unknown or not isinstance(address, str) or not address or not isinstance(filename, str | None):
        what = f"holds {sorted(unknown)}, which nobody would read" if unknown else f"needs {kind}.{name} as a text"
        raise bad_request("invalid_request", f"A '{kind}' part {what}: {HOW_VIDEOS}.", "messages")
    span = _span(given.get("f2l"))
    if name == "file_id":
        return Video(file_id=address, span=span)
    return Video(url=data_uri(address) if name == "file_data" else address, span=span, filename=filename)


def data_uri(file_data: str) -> str:
    """The bytes of a `file_data` as a data URI; OpenAI's clients send one, or its base64 alone."""
    return file_data if file_data[:5].lower() == "data:" else f"data:;base64,{file_data}"


def _span(given: Any, param: str = "messages") -> Span | None:
    if given is None:
        return None
    try:
        return _span_of(given)
    except ValueError as error:
        message = f"The 'f2l' object of a video {error}: for example {{'start': 30, 'end': 90}}."
        raise bad_request("invalid_span", message, param) from error


def _span_of(given: Any) -> Span | None:
    if not isinstance(given, dict) or set(given) - _SPAN_KEYS:
        raise ValueError(f"takes an object with the keys {sorted(_SPAN_KEYS)}; got {given!r}")
    if not given:
        return None
    if "last" in given:
        if len(given) > 1 or not _is_second(given["last"]) or not given["last"]:
            raise ValueError(f"takes either 'last', in seconds, or start and end; got {given!r}")
        return Span(last=float(given["last"]))
    start, end = _moment(given.get("start", 0)), _moment(given.get("end"))
    if not _is_second(start) or not (end is None or _is_second(end)):
        raise ValueError(f"takes start and end in seconds of the video; got {given!r}")
    if end is not None and end <= start:
        raise ValueError(f"must end after it starts; got {given!r}")
    return Span(float(start), math.inf if end is None else float(end))


def _moment(given: Any) -> Any:
    """A text such as 2026-01-31T12:00:00Z as Unix seconds; without a zone it is UTC."""
    if not isinstance(given, str):
        return given
    try:
        moment = datetime.fromisoformat(given)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return given


def _is_second(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
