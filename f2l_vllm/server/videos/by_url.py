"""Videos named by address: fetched, hashed, and entered in the catalog as the caller's files, once for all callers."""

from __future__ import annotations

import asyncio
import hashlib
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit

from f2l_vllm.catalog.jobs import EXHAUSTED
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import FileRecord, Upload
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.single_flight import once
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.server.videos.uploads import inspect, shown_name
from f2l_vllm.store.errors import AdapterIdsExhausted, disk_errors
from f2l_vllm.store.manifest import sha256_of
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import fetch

PURPOSE = "user_data"
_STATUS = {"file_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE}
_PASSING = {EXHAUSTED, "not_enough_memory", "video_lost", AdapterIdsExhausted.code}  # not the video's fault
_AGAIN_SECONDS = 600.0  # each attempt may cost a worker
_Running = dict[tuple[str, str], asyncio.Task[FileRecord]]


class RemoteVideos:
    """The files behind addresses. Used only from the server's event loop.

    Every question fetches its address again, because the content may change. The same bytes are the same file, which
    expires when nobody has asked about it for `F2L_URL_SECONDS`.
    """

    def __init__(self, service: VideoService) -> None:
        self._service = service
        self._fetching: _Running = {}  # by tenant and hash of the address
        self._entering: _Running = {}  # by tenant and hash of the bytes

    async def file(self, url: str, tenant: str, filename: str | None = None) -> FileRecord:
        """The tenant's file with the bytes at this address. It is entered if it does not exist yet.

        Args:
            filename: what a file of a data URI is called.

        Raises:
            APIError: the codes of `f2l_vllm.video.fetch`, of `POST /v1/files` and of `VideoService.enter`.
        """
        key = (tenant, await asyncio.to_thread(_digest, url))  # a data URI may be long
        return await once(self._fetching, key, lambda: self._fetch(url, tenant, filename))

    async def _fetch(self, url: str, tenant: str, filename: str | None) -> FileRecord:
        temporary = self._service.store.temporary()
        try:
            try:
                with disk_errors("keep a video"):
                    await fetch(url, temporary, self._service.settings.fetch_policy, self._service.check_room)
            except VideoError as error:
                status = _STATUS.get(error.code, HTTPStatus.BAD_REQUEST)
                raise APIError(status, error.code, error.message, param="messages") from error
            sha256 = await asyncio.to_thread(sha256_of, temporary)
            name = shown_name(filename) if filename else _name(url)
            return await once(self._entering, (tenant, sha256), lambda: self._enter(temporary, sha256, name, tenant))
        finally:
            await asyncio.to_thread(self._service.store.discard, temporary)

    async def _enter(self, temporary: Path, sha256: str, filename: str, tenant: str) -> FileRecord:
        known = await asyncio.to_thread(self._service.catalog.file_of_address, tenant, sha256)
        if known is not None and not self._may_do_better(known):
            return known
        await inspect(temporary, self._service.settings, PURPOSE)
        size = (await asyncio.to_thread(temporary.stat)).st_size
        idle = self._service.settings.url_seconds
        instead_of = None if known is None else known.id
        upload = Upload(tenant, sha256, size, filename, PURPOSE, idle, idle, from_address=True, instead_of=instead_of)
        return await self._service.enter(temporary, upload)

    def _may_do_better(self, record: FileRecord) -> bool:
        """Whether to retry a failed video: the cause may have passed, and enough time has gone by."""
        passing = record.state is VideoState.ERROR and record.error_code in _PASSING
        return passing and self._service.catalog.now() - record.created_at > _AGAIN_SECONDS


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _name(url: str) -> str:
    """A file name from an address: the end of its path, never its query, which may hold a secret."""
    end = "" if url[:5].lower() == "data:" else unquote(urlsplit(url).path.rsplit("/", 1)[-1])
    return end[:1024] or "video"
