"""Receives a file: writes the multipart body to disk under a cap, hashes it, and inspects it in its own process."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http import HTTPStatus
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from f2l_vllm.catalog.tables import DOCUMENTS, Upload
from f2l_vllm.server.errors import APIError, bad_request
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.settings import Settings
from f2l_vllm.store.errors import disk_errors
from f2l_vllm.video.decoder import DecodeLimits, Decoders
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import VideoInfo

PURPOSES = ("vision", "user_data", "batch")
BATCH_BYTES = 200_000_000  # of a batch's requests, as in OpenAI's API
_OVERHEAD_BYTES = 1 << 20  # multipart boundaries and the other fields
_INSPECTORS = 2
_INSPECT_SECONDS = 20.0
_EXPIRY_SECONDS = (3600, 2592000)  # what the OpenAI API accepts: one hour to thirty days
_IDLE_ANCHORS = ("last_used_at", "last_active_at")  # our name, and the name that other OpenAI objects use
_DIGITS = re.compile("[0-9]{1,9}")  # `isdecimal` accepts the digits of every script
_PLAIN, _EXTENDED = re.compile(rb"(?i);\s*filename\s*="), re.compile(rb"(?i);\s*filename\*\s*=")
_STATUS = {"file_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE}


async def receive(
    request: Request, temporary: Path, settings: Settings, check_room: Callable[[int], None] = lambda _more: None
) -> Upload:
    """Read `POST /v1/files` into `temporary`.

    `check_room` is called with a number of bytes before they are written, and raises if there is no room for them.

    Raises:
        APIError: `file_too_large`, `invalid_request`, `incomplete_upload`, `invalid_purpose`, `invalid_expires_after`,
            `empty_file`.
        StoreUnavailable: there is no room for it, or it cannot be written.
    """
    form, upload, target = await _form(request, "file", temporary, settings.max_upload_bytes, check_room)
    purpose = purpose_of(form.get("purpose"))
    expires_seconds, idle_seconds = expiry_of(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
    pinned = _pinned(form)
    if target.size == 0:
        raise bad_request("empty_file", "The file is empty: send the video's bytes.", "file")
    tenant, sha256, name = tenant_of(request), target.digest.hexdigest(), shown_name(upload.filename)
    return Upload(tenant, sha256, target.size, name, purpose, expires_seconds, idle_seconds, pinned)


async def receive_body(
    request: Request, temporary: Path, cap: int, check_room: Callable[[int], None]
) -> tuple[int, str]:
    """Read a body that is the file itself into `temporary`; its size and its SHA-256 in hex.

    Raises:
        APIError: `file_too_large`, `incomplete_upload`.
        StoreUnavailable: there is no room for it, or it cannot be written.
    """
    try:
        with disk_errors("keep an upload"), _Target(temporary, cap, check_room) as target:
            async for piece in _capped(request, cap, check_room):
                target.write(piece)
    except ClientDisconnect as error:
        raise bad_request("incomplete_upload", "The upload ended before the whole file was here.") from error
    return target.size, target.digest.hexdigest()


async def receive_part(request: Request, temporary: Path, cap: int, check_room: Callable[[int], None]) -> str:
    """Read a part of an upload, the form's field `data`, into `temporary`; returns its SHA-256 in hex.

    Raises:
        APIError, StoreUnavailable: as `receive`.
    """
    try:
        _, _, target = await _form(request, "data", temporary, cap, check_room)
    except APIError as error:
        if error.code == "file_too_large":
            error.message = f"This part may have {cap} bytes at most: send smaller ones, or begin a larger upload."
        raise
    if target.size == 0:
        raise bad_request("empty_file", "The part is empty: send some of the video's bytes.", "data")
    return target.digest.hexdigest()


async def _form(
    request: Request, field: str, temporary: Path, cap: int, check_room: Callable[[int], None]
) -> tuple[FormData, UploadFile, _Target]:
    """The form, its one file, and where that was written."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "multipart/form-data":
        message = f"This route takes multipart/form-data with the bytes in the field '{field}'."
        raise bad_request("invalid_request", message)
    try:
        with disk_errors("keep an upload"), _Target(temporary, cap, check_room) as target:
            form = await _Parser(request.headers, _capped(request, cap, check_room), target).parse()
    except MultiPartException as error:
        raise bad_request("invalid_request", error.message) from error
    except ClientDisconnect as error:
        raise bad_request("incomplete_upload", "The upload ended before the whole file was here.") from error
    upload = form.get(field)
    if not isinstance(upload, UploadFile):
        raise bad_request("invalid_request", f"The field '{field}' is missing: send the video's bytes in it.", field)
    return form, upload, target


async def inspect(path: Path, settings: Settings, purpose: str) -> None:
    """Probe a received file in another process and refuse it if it is no video or too large. The requests of a batch
    are only measured: what is in them is checked when the batch begins.

    Raises:
        APIError: what is wrong with the video, with the codes of `f2l_vllm.video.errors`.
    """
    if purpose in DOCUMENTS:
        check_size(purpose, path.stat().st_size, settings)
        return

    def probe() -> VideoInfo:
        with inspectors().lend() as decoder:
            return decoder.probe(path, settings.video_limits)

    try:
        await asyncio.get_running_loop().run_in_executor(inspecting(), probe)
    except VideoError as error:
        raise APIError(
            _STATUS.get(error.code, HTTPStatus.BAD_REQUEST), error.code, error.message, param="file"
        ) from None


@cache
def inspectors() -> Decoders:
    """Decoders for headers, and for what else is done with a file before it is read."""
    return Decoders(_INSPECTORS, DecodeLimits(seconds=_INSPECT_SECONDS))


@cache
def inspecting() -> ThreadPoolExecutor:
    """Threads where uploads wait for an inspector, so that they take no thread that questions need."""
    return ThreadPoolExecutor(_INSPECTORS, "f2l-inspect")


def check_size(purpose: str, size: int, settings: Settings) -> None:
    """Refuse a file that is larger than those of its purpose may be. Raises APIError `file_too_large`."""
    if purpose in DOCUMENTS and size > BATCH_BYTES:
        raise too_large(BATCH_BYTES, "send several batches")
    if size > settings.max_upload_bytes:
        raise too_large(settings.max_upload_bytes)


def too_large(cap: int, advice: str = "compress or cut the video") -> APIError:
    """413: the upload is over the server's cap."""
    message = f"The upload is larger than the {cap / 1e6:.0f} MB this server accepts: {advice}."
    return APIError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "file_too_large", message, param="file")


class _Target(BufferedWriter):
    """Hashes an upload's bytes as they arrive and writes them to their place on disk, once."""

    def __init__(self, path: Path, cap: int, check_room: Callable[[int], None]) -> None:
        super().__init__(FileIO(path, "wb"))
        self._check_room = check_room
        self._cap = cap
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        """Append bytes.

        Raises:
            APIError: `file_too_large`.
        """
        self.size += len(data)
        if self.size > self._cap:
            raise too_large(self._cap)
        self._check_room(len(data))
        self.digest.update(data)
        return super().write(data)


class _Parser(MultiPartParser):
    """Starlette's parser, which here writes the one file to a target instead of its own temporary file."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], target: _Target) -> None:
        super().__init__(headers, stream, max_files=1, max_fields=16, max_part_size=1 << 16)
        self._target = target

    def on_headers_finished(self) -> None:
        self._charset = "utf-8"  # ignore the client's codec: some of Python's are not for text or fail oddly
        part = self._current_part
        disposition = part.content_disposition or b""
        if _EXTENDED.search(disposition) and not _PLAIN.search(disposition):
            # RFC 5987's form makes a part a file, as the plain form does, but the underlying library ignores it.
            part.content_disposition = _EXTENDED.sub(b";filename=", disposition, count=1)
        super().on_headers_finished()
        if self._current_part.file is not None:
            self._current_part.file.file.close()
            self._current_part.file.file = self._target


async def _capped(request: Request, cap: int, check_room: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
    """The body, limited to the cap whatever its Content-Length says."""
    left = cap + _OVERHEAD_BYTES
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and int(length[:19]) > left:
        raise too_large(cap)
    check_room(int(length) if length.isdecimal() else 0)
    async for piece in request.stream():
        left -= len(piece)
        if left < 0:
            raise too_large(cap)
        yield piece


def shown_name(given: str | None) -> str:
    """A name to show, never a path to open, without unprintable characters."""
    extended = re.fullmatch(r"(?i)utf-8'[^']*'(.*)", given or "")
    given = unquote(extended[1]) if extended else given
    return "".join(letter for letter in given or "" if letter.isprintable())[:1024] or "video"


def purpose_of(purpose: object) -> str:
    """The purpose of a file. Raises APIError `invalid_purpose`."""
    if purpose not in PURPOSES:
        message = f"The field 'purpose' must be one of {', '.join(PURPOSES)}; got {purpose!r}."
        raise bad_request("invalid_purpose", message, "purpose")
    return str(purpose)


def expiry_of(anchor: object, seconds: object) -> tuple[float | None, float | None]:
    """After how many seconds a file expires, and after how many without use it does instead, if set.

    Raises:
        APIError: `invalid_expires_after`.
    """
    if anchor is None and seconds is None:
        return None, None
    low, high = _EXPIRY_SECONDS
    known = anchor == "created_at" or anchor in _IDLE_ANCHORS
    if not known or not _DIGITS.fullmatch(str(seconds)) or not low <= int(str(seconds)) <= high:
        message = f"expires_after needs the anchor 'created_at' or 'last_used_at' and between {low} and {high} seconds."
        raise bad_request("invalid_expires_after", message, "expires_after")
    length = float(str(seconds))
    return length, None if anchor == "created_at" else length


def _pinned(form: FormData) -> bool:
    pinned = form.get("f2l[pinned]", "false")
    if pinned not in ("true", "false"):
        raise bad_request("invalid_f2l_options", "The field 'f2l[pinned]' is 'true' or 'false'.", "f2l")
    return pinned == "true"
