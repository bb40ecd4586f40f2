"""Receiving a video: the multipart body goes to disk under a cap, is hashed, and inspected in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from f2l_vllm.serving.errors import APIError, bad_request
from f2l_vllm.settings import Settings

PURPOSES = ("vision", "user_data")
_OVERHEAD_BYTES = 1 << 20  # multipart boundaries and the other fields
_INSPECT_SECONDS = 60.0
_EXPIRY_SECONDS = (3600, 2592000)  # what the OpenAI API accepts: one hour to thirty days
_STATUS = {"file_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE}


@dataclass(frozen=True)
class Upload:
    """A received file in a temporary place, hashed."""

    path: Path
    sha256: str
    bytes: int
    filename: str
    purpose: str
    expires_at: float | None


async def receive(request: Request, temporary: Path, settings: Settings) -> Upload:
    """Read `POST /v1/files` into `temporary`.

    Raises:
        APIError: `file_too_large`, `invalid_request`, `invalid_purpose`, `invalid_expires_after`, `empty_file`.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise bad_request(
            "invalid_request", "POST /v1/files takes multipart/form-data with the fields file and purpose."
        )
    cap = settings.max_upload_bytes
    try:
        async with _Capped(request, cap).form(max_files=1, max_fields=16) as form:
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise bad_request(
                    "invalid_request", "The field 'file' is missing: send the video's bytes in it.", "file"
                )
            purpose = _purpose(form)
            expires_at = _expires_at(form)
            sha256, size = await asyncio.to_thread(_store, upload, temporary)
            if size == 0:
                raise bad_request("empty_file", "The file is empty: send the video's bytes.", "file")
            if size > cap:
                raise too_large(cap)
            return Upload(temporary, sha256, size, (upload.filename or "video")[:1024], purpose, expires_at)
    except HTTPException as error:  # Starlette's words for a body that is no multipart form
        raise bad_request("invalid_request", str(error.detail)) from error


async def inspect(path: Path, settings: Settings) -> dict[str, Any]:
    """Probe a received file; its header as a dictionary.

    Raises:
        APIError: what is wrong with the video, by the codes of `f2l_vllm.video.errors`.
    """
    limits = {
        "max_bytes": settings.max_upload_bytes,
        "max_duration_s": settings.max_video_seconds,
        "max_pixels": settings.max_video_pixels,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "f2l_vllm.video.inspect", str(path), json.dumps(limits)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _INSPECT_SECONDS)
        answer: dict[str, Any] = json.loads(output)
    except (TimeoutError, ValueError) as error:
        message = "The file's header cannot be read in reasonable time and memory: convert it to H.264 in an mp4 file."
        raise bad_request("not_a_video", message, "file") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if "code" in answer:
        status = _STATUS.get(answer["code"], HTTPStatus.BAD_REQUEST)
        raise APIError(status, answer["code"], answer["message"], param="file")
    return answer


def too_large(cap: int) -> APIError:
    """413: over the server's cap."""
    message = f"The upload is larger than the {cap / 1e6:.0f} MB this server accepts: compress or cut the video."
    return APIError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "file_too_large", message, param="file")


class _Capped(Request):
    """A request whose body may not grow past the cap, whatever its Content-Length says."""

    def __init__(self, request: Request, cap: int) -> None:
        self._left = cap + _OVERHEAD_BYTES
        self._cap = cap
        if int(request.headers.get("content-length", 0)) > self._left:
            raise too_large(cap)
        self._inner = request.receive
        super().__init__(request.scope, self._receive_capped)

    async def _receive_capped(self) -> Message:
        message = await self._inner()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise too_large(self._cap)
        return message


def _store(upload: UploadFile, path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as target:
        while chunk := upload.file.read(1 << 20):
            digest.update(chunk)
            target.write(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _purpose(form: FormData) -> str:
    purpose = form.get("purpose")
    if purpose not in PURPOSES:
        message = f"The field 'purpose' must be one of {', '.join(PURPOSES)}; got {purpose!r}."
        raise bad_request("invalid_purpose", message, "purpose")
    return str(purpose)


def _expires_at(form: FormData) -> float | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    low, high = _EXPIRY_SECONDS
    if anchor != "created_at" or not str(seconds).isdecimal() or not low <= int(str(seconds)) <= high:
        message = f"expires_after needs the anchor 'created_at' and between {low} and {high} seconds."
        raise bad_request("invalid_expires_after", message, "expires_after")
    return time.time() + int(str(seconds))
