"""Files that are uploaded in parts, which any server of the catalog takes and any other puts together.

Each part is a file of its own, of a tenant that has the upload's id for its name: it is kept, counted, removed and
expires as all files do, and belongs to nobody who could ask about it.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from weakref import WeakValueDictionary

from f2l_vllm.catalog.catalog import Catalog, QuotaExceeded
from f2l_vllm.catalog.tables import FileRecord, Upload
from f2l_vllm.catalog.upload_tables import PartialUpload
from f2l_vllm.catalog.uploads import TooManyUploads
from f2l_vllm.server.errors import APIError, bad_request
from f2l_vllm.server.videos.keeping import Keeper, Write
from f2l_vllm.store.errors import disk_errors

PART_BYTES = 64 << 20  # the largest, as in OpenAI's API
_AT_ONCE = 64  # uploads of one tenant
_MOST_PARTS = 10_000
_GRACE_SECONDS = 600.0  # that a part outlasts its upload, which may be completed in its last moment


class Parts:
    """The parts of all uploads.

    Args:
        write: runs a catalog method that may wait for other writers.
        fetch: gives a file's bytes as a local file. It is called in a thread.
    """

    def __init__(self, catalog: Catalog, keeper: Keeper, write: Write, fetch: Callable[[FileRecord], Path]) -> None:
        self._catalog, self._keeper, self._write, self._fetch = catalog, keeper, write, fetch
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by upload

    def lock(self, upload_id: str) -> asyncio.Lock:
        """Held by the one request of this server that ends an upload."""
        return self._locks.setdefault(upload_id, asyncio.Lock())

    async def begin(
        self, tenant: str, size: int, filename: str, purpose: str, expiry: tuple[float | None, float | None]
    ) -> PartialUpload:
        """Enter a new upload of so many bytes.

        Raises:
            APIError: `too_many_uploads`.
            Unavailable: the catalog cannot take it now.
        """
        begin = functools.partial(self._catalog.begin_upload, limit=_AT_ONCE)
        try:
            upload: PartialUpload = await self._write(begin, tenant, size, filename, purpose, expiry)
            return upload
        except TooManyUploads as error:
            message = f"{_AT_ONCE} of your uploads wait for parts: complete or cancel some, or begin again later."
            headers = {"Retry-After": "60"}
            raise APIError(HTTPStatus.TOO_MANY_REQUESTS, "too_many_uploads", message, headers=headers) from error

    async def find(self, upload_id: str, tenant: str) -> PartialUpload:
        """The tenant's upload.

        Raises:
            APIError: `upload_not_found`: unknown, expired, or another tenant's.
        """
        upload = await asyncio.to_thread(self._catalog.upload, upload_id, tenant)
        if upload is None:
            message = f"No upload with the id '{upload_id[:80]}' is open: begin one with POST /v1/uploads"
            raise APIError(HTTPStatus.NOT_FOUND, "upload_not_found", f"{message}. It lasts an hour.")
        return upload

    async def pending(self, upload_id: str, tenant: str) -> PartialUpload:
        """The same, if parts may still come.

        Raises:
            APIError: `upload_not_found`, `upload_not_pending`.
        """
        return check_pending(await self.find(upload_id, tenant))

    async def add(self, upload: PartialUpload, temporary: Path, sha256: str) -> str:
        """Keep a part; returns its id. The same bytes again are the same part.

        Raises:
            APIError: `file_too_large`: more bytes than were announced; `invalid_request`: too many parts.
            Unavailable: store or catalog cannot take it now.
        """
        if await asyncio.to_thread(self._catalog.count_parts, upload) >= _MOST_PARTS:
            raise bad_request("invalid_request", f"An upload has {_MOST_PARTS:,} parts at most: send larger ones.")
        name = f"part_{hashlib.sha256(f'{upload.id} {sha256}'.encode()).hexdigest()[:32]}"
        seconds = upload.expires_at - self._catalog.now() + _GRACE_SECONDS
        size = temporary.stat().st_size
        part = Upload(upload.id, sha256, size, upload.filename, "upload_part", seconds, file_id=name)
        add = functools.partial(self._catalog.add_file, part, "", queue_limit=0, tenant_bytes=upload.bytes)
        try:
            return (await self._keeper.enter(temporary, part, add)).id
        except QuotaExceeded as error:
            message = f"The parts have more than the {upload.bytes} bytes that were announced: cancel, and begin again."
            raise APIError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "file_too_large", message, param="data") from error

    async def join(self, upload: PartialUpload, part_ids: Sequence[str], md5: str | None, target: Path) -> str:
        """Write the parts into one file, in this order; returns its SHA-256 in hex.

        Raises:
            APIError: `invalid_request`: a part is unknown; `incomplete_upload`, `checksum_mismatch`.
            Unavailable: store or catalog cannot be asked, or the file cannot be written.
        """
        known = await asyncio.to_thread(self._catalog.find, list(dict.fromkeys(part_ids)), upload.id)
        if unknown := [part_id for part_id in part_ids if part_id not in known]:
            raise bad_request("invalid_request", f"The upload has no part '{unknown[0][:80]}'.", "part_ids")
        parts = [known[part_id].file for part_id in part_ids]
        if (size := sum(part.bytes for part in parts)) != upload.bytes:
            message = f"These parts have {size} bytes, and {upload.bytes} were announced: send what is missing."
            raise bad_request("incomplete_upload", message, "part_ids")
        sha256, checksum = await asyncio.to_thread(self._write_whole, parts, target)
        if md5 is not None and checksum != md5.lower():
            message = f"The parts have the MD5 {checksum}, not {md5[:64]!r}: one of them differs."
            raise bad_request("checksum_mismatch", message, "md5")
        return sha256

    def _write_whole(self, parts: Sequence[FileRecord], target: Path) -> tuple[str, str]:
        whole, checksum = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with disk_errors("keep an upload"), target.open("wb") as file:
            for record in parts:
                with self._fetch(record).open("rb") as part:
                    while piece := part.read(1 << 20):
                        whole.update(piece)
                        checksum.update(piece)
                        file.write(piece)
        return whole.hexdigest(), checksum.hexdigest()

    async def end(self, upload: PartialUpload, status: str, file_id: str | None = None) -> PartialUpload:
        """Note that it is completed or cancelled, unless it has ended already, and drop its parts. What it came to is
        known until it expires; parts that are not dropped now expire.

        Raises:
            Unavailable: the catalog cannot be told now.
        """
        ended: PartialUpload = await self._write(self._catalog.end_upload, upload, status, file_id)
        everything = functools.partial(self._catalog.files, upload.id, after=None, limit=_MOST_PARTS, descending=False)
        parts, _ = await asyncio.to_thread(everything)
        removals = [await self._write(self._catalog.remove_file, part.id, upload.id) for part in parts]
        await self._keeper.bury([doomed for removal in removals if removal for doomed in removal.doomed])
        return ended


def check_pending(upload: PartialUpload) -> PartialUpload:
    """The upload, if parts may still come. Raises APIError `upload_not_pending`."""
    if upload.status != "pending":
        raise bad_request("upload_not_pending", f"The upload '{upload.id}' is {upload.status}: begin another one.")
    return upload
