"""A batch's requests, a JSON object in each line of its input, and its answers, the same of its output.

Source: OpenAI API reference, Batch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2l_vllm.server.errors import APIError
from f2l_vllm.server.middleware import json_bodies

ENDPOINTS = ("/v1/chat/completions", "/v1/responses", "/v1/completions")
MAX_LINES = 50_000
_REPORTED = 50  # faults that one batch lists
_LONGEST_ID = 512
_KEYS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class Line:
    """One request: its line, counted from 1, the client's name for it, and where it is in the input."""

    number: int
    custom_id: str
    offset: int
    length: int


class Requests:
    """The requests in a batch's input. All methods are for a thread.

    Args:
        path: the input.
        endpoint: where all of them go.
        max_bytes: the largest of them.

    Attributes:
        lines: those that can be asked.
        faults: what is wrong with the others, as OpenAI's clients read it in `batch.errors`.
    """

    def __init__(self, path: Path, endpoint: str, max_bytes: int) -> None:
        self._file = path.open("rb")
        self.lines: list[Line] = []
        self.faults: list[dict[str, Any]] = []
        known: dict[str, int] = {}
        offset = 0
        for number, text in enumerate(self._file, 1):
            start, offset = offset, offset + len(text)
            if text.isspace():
                continue
            if len(self.lines) == MAX_LINES:
                self._fault("too_many_lines", f"A batch has {MAX_LINES:,} requests at most: send several.", None)
                break
            try:
                custom_id = _checked(text, endpoint, max_bytes)
                if (first := known.setdefault(custom_id, number)) != number:
                    raise _Fault("duplicate_custom_id", f"Line {first} has this custom_id already.", "custom_id")
            except _Fault as fault:
                self._fault(fault.code, fault.message, number, fault.param)
                if len(self.faults) == _REPORTED:
                    break
            else:
                self.lines.append(Line(number, custom_id, start, len(text)))
        if not self.lines and not self.faults:
            self._fault("empty_file", "The input has no requests: write one in each line.", None)

    def close(self) -> None:
        """Close the input."""
        self._file.close()

    def body(self, line: Line) -> bytes:
        """What a line asks, as JSON. It waits for its videos as long as the batch lasts, whatever wait it names."""
        body = json.loads(os.pread(self._file.fileno(), line.length, line.offset))["body"]
        if isinstance(body.get("f2l"), dict):
            body["f2l"].pop("wait", None)
        return json.dumps(body).encode()

    def _fault(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        self.faults.append({"code": code, "message": message, "param": param, "line": line})


class _Fault(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def _checked(text: bytes, endpoint: str, max_bytes: int) -> str:
    """The custom id of a line that can be asked."""
    if len(text) > max_bytes:
        raise _Fault("request_too_large", f"A request has {max_bytes / 1e6:.0f} MB at most.")
    try:
        given = json_bodies.parse(text)
    except APIError as error:
        raise _Fault(error.code, error.message.replace("The request's body", "The line", 1)) from error
    if not isinstance(given, dict) or set(given) != _KEYS:
        raise _Fault("invalid_request", f"A line is an object with the keys {', '.join(sorted(_KEYS))}.")
    custom_id, body = given["custom_id"], given["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_ID:
        raise _Fault("invalid_request", f"custom_id is a string of 1 to {_LONGEST_ID} characters.", "custom_id")
    if given["method"] != "POST":
        raise _Fault("invalid_request", "The method is POST.", "method")
    if given["url"] != endpoint:
        raise _Fault("invalid_request", f"The url is the batch's endpoint, {endpoint}.", "url")
    if not isinstance(body, dict):
        raise _Fault("invalid_request", "The body is an object.", "body")
    for name in ("stream", "background"):
        if body.get(name):
            raise _Fault("unsupported_field", f"A batch's answers come whole, in its output: leave out '{name}'.", name)
    return custom_id


def answer(batch_id: str, line: Line, status: int, request_id: str | None, body: Any) -> str:
    """The line of the output, or of the errors, with what a request was answered."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(batch_id, line, response=response, error=None)


def unanswered(batch_id: str, line: Line) -> str:
    """The line of the errors for a request whose turn did not come in time."""
    message = "This request could not be answered before the batch expired: send it in another one."
    return _line(batch_id, line, response=None, error={"code": "batch_expired", "message": message})


def _line(batch_id: str, line: Line, **values: Any) -> str:
    name = f"batch_req_{batch_id.removeprefix('batch_')}_{line.number}"
    return json.dumps({"id": name, "custom_id": line.custom_id, **values}) + "\n"
