"""Videos that are uploaded in parts: on this server's disk until they are complete, cancelled or an hour old."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from pathlib import Path

from f2l_vllm.files import read_json, sync, write_whole
from f2l_vllm.server.errors import APIError, bad_request
from f2l_vllm.store.errors import disk_errors

PART_BYTES = 64 << 20  # the largest, as in OpenAI's API
LASTING_SECONDS = 3600.0
_GRACE_SECONDS = 600.0  # for one that is completed in its last moment
_AT_ONCE = 64  # uploads of one tenant
_MOST_PARTS = 10_000
_ID = re.compile(r"upload_[0-9a-f]{24}")
_STATE = "upload.json"


@dataclass(frozen=True)
class PartialUpload:
    """A video that comes in parts; `status` is pending, completed or cancelled, as OpenAI's clients know it."""

    id: str
    tenant: str
    bytes: int
    filename: str
    purpose: str
    created_at: float
    expires_seconds: float | None = None
    idle_seconds: float | None = None
    status: str = "pending"
    file_id: str | None = None

    @property
    def expires_at(self) -> float:
        """When it is forgotten, Unix seconds."""
        return self.created_at + LASTING_SECONDS


class PartialUploads:
    """A folder for each, with its parts, each named by its hash: a part that is sent again is the same part.

    All methods are for a thread. What they say is on the disk, so a restart changes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(
        self, tenant: str, size: int, filename: str, purpose: str, expiry: tuple[float | None, float | None]
    ) -> PartialUpload:
        """Enter a new one.

        Raises:
            APIError: `too_many_uploads`.
            StoreUnavailable: it cannot be written.
        """
        if len(self._pending(tenant)) >= _AT_ONCE:
            message = f"{_AT_ONCE} of your uploads wait for parts: complete or cancel some, or begin again later."
            headers = {"Retry-After": "60"}
            raise APIError(HTTPStatus.TOO_MANY_REQUESTS, "too_many_uploads", message, headers=headers)
        name = f"upload_{secrets.token_hex(12)}"
        upload = PartialUpload(name, tenant, size, filename, purpose, time.time(), *expiry)
        self._write(upload)
        return upload

    def find(self, upload_id: str, tenant: str) -> PartialUpload:
        """The tenant's upload.

        Raises:
            APIError: `upload_not_found`: unknown, expired, or another tenant's.
        """
        upload = self._read(self._folder / upload_id) if _ID.fullmatch(upload_id) else None
        if upload is None or upload.tenant != tenant or upload.expires_at <= time.time():
            raise _not_found(upload_id)
        return upload

    def pending(self, upload_id: str, tenant: str) -> PartialUpload:
        """The same, if parts may still come.

        Raises:
            APIError: `upload_not_found`, `upload_not_pending`.
        """
        upload = self.find(upload_id, tenant)
        if upload.status != "pending":
            raise bad_request("upload_not_pending", f"The upload '{upload_id}' is {upload.status}: begin another one.")
        return upload

    def promised_bytes(self, tenant: str) -> int:
        """How many bytes the tenant's pending uploads are going to have."""
        return sum(upload.bytes for upload in self._pending(tenant))

    def add(self, upload: PartialUpload, temporary: Path, sha256: str) -> str:
        """Keep a part; returns its id.

        Raises:
            APIError: `file_too_large`: more bytes than were announced; `invalid_request`: too many parts;
                `upload_not_found`.
            StoreUnavailable: it cannot be written.
        """
        folder, part_id = self._folder / upload.id, f"part_{sha256}"
        sizes = {path.name: path.stat().st_size for path in folder.glob("part_*")}
        sizes[part_id] = temporary.stat().st_size
        if len(sizes) > _MOST_PARTS:
            raise bad_request("invalid_request", f"An upload has {_MOST_PARTS:,} parts at most: send larger ones.")
        if sum(sizes.values()) > upload.bytes:
            message = f"The parts have more than the {upload.bytes} bytes that were announced: cancel, and begin again."
            raise APIError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "file_too_large", message, param="data")
        try:
            with disk_errors("keep an upload"):
                sync(temporary)
                os.replace(temporary, folder / part_id)
                sync(folder)
        except FileNotFoundError as error:
            raise _not_found(upload.id) from error  # expired a moment ago
        return part_id

    def join(self, upload: PartialUpload, part_ids: Sequence[str], md5: str | None, target: Path) -> str:
        """Write the parts into one file, in this order; returns its SHA-256 in hex.

        Raises:
            APIError: `invalid_request`: a part is unknown; `incomplete_upload`, `checksum_mismatch`.
            StoreUnavailable: it cannot be written.
        """
        folder = self._folder / upload.id
        known = {path.name: path.stat().st_size for path in folder.glob("part_*")}
        if unknown := [part_id for part_id in part_ids if part_id not in known]:
            raise bad_request("invalid_request", f"The upload has no part '{unknown[0][:80]}'.", "part_ids")
        if (size := sum(known[part_id] for part_id in part_ids)) != upload.bytes:
            message = f"These parts have {size} bytes, and {upload.bytes} were announced: send what is missing."
            raise bad_request("incomplete_upload", message, "part_ids")
        whole, checksum = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with disk_errors("keep an upload"), target.open("wb") as file:
            for part_id in part_ids:
                with (folder / part_id).open("rb") as part:
                    while piece := part.read(1 << 20):
                        whole.update(piece)
                        checksum.update(piece)
                        file.write(piece)
        if md5 is not None and checksum.hexdigest() != md5.lower():
            message = f"The parts have the MD5 {checksum.hexdigest()}, not {md5[:64]!r}: one of them differs."
            raise bad_request("checksum_mismatch", message, "md5")
        return whole.hexdigest()

    def end(self, upload: PartialUpload, status: str, file_id: str | None = None) -> PartialUpload:
        """Note that it is completed or cancelled, and drop its parts. What it came to is known until it expires.

        Raises:
            StoreUnavailable: it cannot be written.
        """
        ended = replace(upload, status=status, file_id=file_id)
        self._write(ended)
        for part in (self._folder / upload.id).glob("part_*"):
            part.unlink(missing_ok=True)
        return ended

    def sweep(self) -> None:
        """Remove what has expired, and what cannot be read."""
        for folder in self._folders():
            upload = self._read(folder)
            began = folder.stat().st_mtime if upload is None else upload.created_at
            if began + LASTING_SECONDS + _GRACE_SECONDS <= time.time():
                shutil.rmtree(folder, ignore_errors=True)

    def _pending(self, tenant: str) -> list[PartialUpload]:
        uploads = [upload for folder in self._folders() if (upload := self._read(folder)) is not None]
        now = time.time()
        return [one for one in uploads if one.tenant == tenant and one.status == "pending" and one.expires_at > now]

    def _folders(self) -> Iterator[Path]:
        return self._folder.glob("upload_*")

    def _read(self, folder: Path) -> PartialUpload | None:
        try:
            return PartialUpload(**read_json(folder / _STATE))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, upload: PartialUpload) -> None:
        with disk_errors("keep an upload"):
            write_whole(self._folder / upload.id / _STATE, json.dumps(asdict(upload)))


def _not_found(upload_id: str) -> APIError:
    message = f"No upload with the id '{upload_id[:80]}' is open: begin one with POST /v1/uploads. It lasts an hour."
    return APIError(HTTPStatus.NOT_FOUND, "upload_not_found", message)
