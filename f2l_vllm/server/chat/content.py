"""Which content of a request vLLM may see: only known content parts with known keys.

vLLM recognizes a part by its `type`, by its keys if the type is missing, and again by its keys if it holds a `uuid`. It
passes some kinds to libraries that open paths and addresses, or read pickled tensors, by themselves. So a part passes
here only if its type is in `PARTS` and every key belongs to that type. `REFUSED` lists other fields of a request that
would fetch or open something, change how it is decoded, or read data that another client left.

This module alone decides it for every route (`bodies.py` calls it before any route sees a body). A contract test goes
through the table of parsers and the fields of all request models of the supported vLLM, and fails if it finds one that
this module does not cover.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from f2l_vllm.server.errors import APIError, bad_request

LONGEST_UUID = 256
HOW_VIDEOS = (
    "on /v1/chat/completions, name a video as {'type': 'file', 'file': {'file_id': …}} (or 'file_data', its bytes) or "
    "{'type': 'video_url', 'video_url': {'url': …}}; on /v1/responses, as {'type': 'input_file', 'file_id': …}"
)
_SCHEMES = ("data:", "http://", "https://")
_BREAKPOINT = "prompt_cache_breakpoint"  # OpenAI's hint to its cache; nothing here reads it
_TEXT = frozenset({"text", "annotations", "cache_control", "citations", "logprobs", _BREAKPOINT})
_TOOL = frozenset({"cache_control", "caller", "id", "input", "name"})

# Every type of content part, under each name that any route uses for it, and its keys besides `type`.
PARTS: Mapping[str, frozenset[str]] = {
    "text": _TEXT,
    "input_text": _TEXT,
    "output_text": _TEXT,
    "reasoning_text": _TEXT,
    "summary_text": _TEXT,
    "refusal": frozenset({"refusal"}),
    "thinking": frozenset({"thinking", "closed", "signature"}),
    "redacted_thinking": frozenset({"data"}),
    "image_url": frozenset({"image_url", "detail", "uuid", _BREAKPOINT}),
    "input_image": frozenset({"image_url", "detail", _BREAKPOINT}),
    "image": frozenset({"source", "cache_control"}),
    "file": frozenset({"file"}),
    "input_file": frozenset({"file_id", "file_data", "file_url", "filename", "f2l"}),
    "video_url": frozenset({"video_url"}),
    "tool_use": _TOOL,
    "tool_result": frozenset({"tool_use_id", "content", "is_error", "cache_control"}),
    "tool_reference": frozenset({"name", "tool_name", "cache_control"}),
    "tool_addition": frozenset({"tool"}),
    "tool_removal": frozenset({"tool"}),
}
# Items of a conversation on /v1/responses that do not consist of parts alone.
ITEMS = frozenset(
    {
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
    }
)
# Fields of a body that hold conversations, then those that hold the content of one message.
CONVERSATIONS = (
    "messages",
    "input",
    "inputs",
    "query",
    "queries",
    "items",
    "data_1",
    "data_2",
    "text_1",
    "text_2",
    "documents",
)
CONTENTS = ("system",)
REQUESTS = ("chat_request", "completion_request")  # a request within a request
_IN_MESSAGES = ("content", "output", "summary")

REFUSED: Mapping[str, str] = {
    "prompt_embeds": "embeddings are not taken",
    "mm_processor_kwargs": "how media are processed is the operator's to say",
    "media_io_kwargs": "how media are decoded is the operator's to say",
    "kv_transfer_params": "it is for servers that pass caches to each other",
    "ec_transfer_params": "it is for servers that pass caches to each other",
    "features": "it names what other clients left in a cache",
    "content_parts": "media are taken in messages only",
    "images": "media are taken in messages only",
    "videos": "media are taken in messages only",
    "multi_modal_data": "media are taken in messages only",
    "multi_modal_uuids": "media are taken in messages only",
    "previous_input_messages": "send the conversation as 'input'",
}
# vLLM reads these names in `vllm_xargs` as fields that are themselves refused.
_REFUSED_XARGS = frozenset({"kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"})


def admit(body: Any, tenant: str, max_images: int) -> bool:
    """Check a request's body, and write the tenant into the `uuid`s under which vLLM keeps pictures.

    Returns:
        Whether the body was changed.

    Raises:
        APIError: `unsupported_part`, `unsupported_field`, `invalid_request`, `invalid_uuid`, `url_not_allowed`,
            `too_many_images`.
    """
    check = _Check(tenant, max_images)
    check.request(body)
    return check.changed


def private(tenant: str, name: str) -> str:
    """A version of `name` for this tenant, which can equal no other tenant's name."""
    return hashlib.sha256(json.dumps([tenant, name]).encode()).hexdigest()


class _Check:
    """Checks one body against the tables above."""

    def __init__(self, tenant: str, max_images: int) -> None:
        self.changed = False
        self._tenant = tenant
        self._images_left = self._max_images = max_images
        self._readers: Mapping[str, Callable[[dict[str, Any]], None]] = {
            "image_url": self._image_url,
            "input_image": self._input_image,
            "image": self._image,
            "video_url": self._video_url,
            "input_file": self._input_file,
            "tool_result": self._tool_result,
        }

    def request(self, body: Any) -> None:
        if not isinstance(body, dict):
            return  # all routes of vLLM refuse it
        for name in REFUSED.keys() & body.keys():
            if body[name]:
                raise _refused_field(name)
        xargs = body.get("vllm_xargs")
        if isinstance(xargs, dict) and (names := sorted(_REFUSED_XARGS & xargs.keys())):
            raise _refused_field(f"vllm_xargs.{names[0]}")
        if isinstance(body.get("audio"), list) and body["audio"]:
            raise _refused_field("audio")  # a list of addresses; OpenAI's field of that name is an object
        for name in CONVERSATIONS:
            self._conversation(body.get(name), name)
        for name in CONTENTS:
            self._content(body.get(name), name)
        for name in REQUESTS:
            if body.get(name) is not None:
                self.request(body[name])

    def _conversation(self, value: Any, param: str) -> None:
        """Check a text, a message, or lists of them, to the depth of batches."""
        for outer in value if isinstance(value, list) else [value]:
            for message in outer if isinstance(outer, list) else [outer]:
                if isinstance(message, dict):
                    self._message(message, param)
                elif isinstance(message, list) and any(isinstance(inner, dict | list) for inner in message):
                    raise bad_request("invalid_request", f"'{param}' holds lists within lists.", param)

    def _message(self, message: dict[str, Any], param: str) -> None:
        kind = message.get("type")
        if kind is not None and not (isinstance(kind, str) and kind in ITEMS):
            raise _unsupported(kind, param)
        for name in _IN_MESSAGES:
            self._content(message.get(name), param)

    def _content(self, content: Any, param: str, within: str | None = None) -> None:
        if content is None or isinstance(content, str):
            return
        if not isinstance(content, list):
            raise bad_request("invalid_request", "A message's content is a text or a list of parts.", param)
        for part in content:
            if not isinstance(part, str):
                self._part(part, param, within)

    def _part(self, part: Any, param: str, within: str | None) -> None:
        if not isinstance(part, dict):
            raise bad_request("invalid_request", "A content part is a text or an object with a 'type'.", param)
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in PARTS or kind == within:
            raise _unsupported(kind, param)
        if part.get("uuid", "") is None:
            del part["uuid"]
            self.changed = True
        unknown = sorted(part.keys() - PARTS[kind] - {"type"})
        if unknown:
            message = f"A content part of type '{kind}' holds {unknown}, which nobody would read."
            raise bad_request("invalid_request", message, param)
        if kind in _TEXTS and not isinstance(part.get(_TEXTS[kind], ""), str):
            raise bad_request("invalid_request", f"In a part of type '{kind}', '{_TEXTS[kind]}' is a text.", param)
        if kind in self._readers:
            self._readers[kind](part)

    def _image_url(self, part: dict[str, Any]) -> None:
        image = part.get("image_url")
        if isinstance(image, str):
            image = part["image_url"] = {"url": image}
            self.changed = True
        if "uuid" in part:
            part["uuid"] = private(self._tenant, _uuid(part["uuid"]))
            self.changed = True
            if image is None:
                self._count()
                return  # it means the picture that vLLM keeps under the uuid
        if not isinstance(image, dict) or image.keys() - {"url", "detail"}:
            message = "An 'image_url' part names its picture as {'url': …}, with 'detail' if you like."
            raise bad_request("invalid_request", message, "messages")
        self._address(image.get("url"))

    def _input_image(self, part: dict[str, Any]) -> None:
        self._address(part.get("image_url"))

    def _image(self, part: dict[str, Any]) -> None:
        given = part.get("source")
        source = given if isinstance(given, dict) else {}
        keys = {"base64": {"media_type", "data"}, "url": {"url"}}.get(str(source.get("type")))
        if (
            keys is None
            or source.keys() - keys - {"type"}
            or not all(isinstance(text, str) for text in source.values())
        ):
            known = "{'type': 'base64', 'media_type': …, 'data': …} or {'type': 'url', 'url': …}"
            raise bad_request("invalid_request", f"The 'source' of a picture is {known}.", "messages")
        self._address(source.get("url", "data:"))

    def _video_url(self, part: dict[str, Any]) -> None:
        video = part.get("video_url")
        url = video.get("url") if isinstance(video, dict) else video
        if url is not None:  # otherwise the code that reads videos reports what is missing
            check_address(url)

    def _input_file(self, part: dict[str, Any]) -> None:
        if (url := part.get("file_url")) is not None:
            check_address(url)

    def _tool_result(self, part: dict[str, Any]) -> None:
        self._content(part.get("content"), "messages", within="tool_result")

    def _address(self, url: Any) -> None:
        check_address(url)
        self._count()

    def _count(self) -> None:
        self._images_left -= 1
        if self._images_left < 0:
            message = f"A question may hold {self._max_images} pictures: leave some out, or ask in several."
            raise bad_request("too_many_images", message, "messages")


_TEXTS = {
    **{kind: "text" for kind, keys in PARTS.items() if "text" in keys},
    "refusal": "refusal",
    "thinking": "thinking",
    "tool_reference": "name",
}


def check_address(url: Any) -> None:
    """Refuse a value that is no media address.

    Raises:
        APIError: `invalid_request`, `url_not_allowed`.
    """
    if not isinstance(url, str):
        raise bad_request("invalid_request", "The address of a picture or video is a text.", "messages")
    if not url.lower().startswith(_SCHEMES):
        message = "A picture or video is named by an http(s) address or a data: URI."
        raise bad_request("url_not_allowed", message, "messages")


def _uuid(given: Any) -> str:
    if not isinstance(given, str) or not 0 < len(given) <= LONGEST_UUID:
        raise bad_request(
            "invalid_uuid", f"A picture's 'uuid' is a text of 1 to {LONGEST_UUID} characters.", "messages"
        )
    return given


def _unsupported(kind: Any, param: str) -> APIError:
    if not isinstance(kind, str):
        return bad_request("unsupported_part", "A content part needs a 'type', such as 'text' or 'image_url'.", param)
    known = ", ".join(sorted(PARTS))
    message = f"Content of type '{kind[:64]}' is not taken. There are {known}; {HOW_VIDEOS}."
    return bad_request("unsupported_part", message, param)


def _refused_field(name: str) -> APIError:
    why = REFUSED.get(name.removeprefix("vllm_xargs."), "media are taken in messages only")
    return bad_request("unsupported_field", f"'{name}' is not taken from clients here: {why}. Leave it out.", name)
