"""The video service of one API server: uploads, readiness and removal, on top of catalog, store, pool and engine."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from f2l_vllm import tracing
from f2l_vllm.catalog.catalog import Catalog, QueueFull, QuotaExceeded
from f2l_vllm.catalog.listener import Listener
from f2l_vllm.catalog.states import IN_WORK, VideoState
from f2l_vllm.catalog.stream_tables import STREAM_PREFIX
from f2l_vllm.catalog.tables import DOCUMENTS, AdapterRecord, FileRecord, FileWithAdapter, Tombstone, Upload
from f2l_vllm.pool.supervisor import PoolProcess
from f2l_vllm.server import metrics
from f2l_vllm.server.catalog_keys import CatalogKeys
from f2l_vllm.server.errors import (
    APIError,
    HTTPStatus,
    bad_request,
    shutting_down,
    video_failed,
    video_not_found,
    video_not_ready,
)
from f2l_vllm.server.registry import Registry
from f2l_vllm.server.videos.forgetting import Forgetting
from f2l_vllm.server.videos.janitor import Janitor, try_all
from f2l_vllm.server.videos.keeping import Keeper
from f2l_vllm.server.videos.membership import Membership
from f2l_vllm.server.videos.parts import Parts
from f2l_vllm.server.videos.residents import Residents
from f2l_vllm.server.videos.watcher import Watcher
from f2l_vllm.settings import Settings
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.errors import OtherModels, Unavailable
from f2l_vllm.store.store import Store, StoreError

logger = logging.getLogger(__name__)

_MAINTENANCE_SECONDS = 5.0
_CLEANING_SECONDS = 60.0
_SWEEP_SECONDS = 3600.0
_ENDLESS = 1 << 30
_WRITERS = 4  # threads for catalog writes, so that questions, which only read, never wait for one


class VideoService:
    """The methods that the routes and the chat handler use. Lives on the API server's event loop."""

    def __init__(
        self,
        settings: Settings,
        revisions: Revisions,
        catalog: Catalog,
        store: Store,
        registry: Registry,
        pool: PoolProcess | None,
        is_stopping: Callable[[], bool],
        listener: Listener | None = None,
    ) -> None:
        """`pool` is None when other processes run the workers; `is_stopping`: whether the server is shutting down;
        `listener` is None when the catalog sends no notices."""
        self.settings = settings
        self.catalog = catalog
        self.store = store
        self.registry = registry
        self.pool = pool
        self._revisions = revisions
        self._is_stopping = is_stopping
        self._listener = listener
        share = settings.queue_share if settings.tenants is not None else 1.0
        self.watcher = Watcher(catalog, is_stopping, share, listener)
        self._writers = ThreadPoolExecutor(_WRITERS, "f2l-catalog")
        self._keeper = Keeper(catalog, store, registry, self._write)
        revision = revisions.name("")
        self.keys = CatalogKeys(catalog)
        self.forgetting = Forgetting(catalog, store, registry, self.keys, revision, self._write)
        self.janitor = Janitor(catalog, self._keeper, lambda: self.forgetting.name, self._write)
        self.membership = Membership(catalog, self.forgetting, revision, self.adopt, listener)
        self.parts = Parts(catalog, self._keeper, self._write, self.fetch_video)
        self.residents = Residents(catalog, store, registry, revision, lambda: self.forgetting.name)
        self._used: dict[str, float] = {}  # file ids, and when they were asked about
        self._cleaned, self._swept = -_CLEANING_SECONDS, -_SWEEP_SECONDS

    async def enter(self, temporary: Path, upload: Upload) -> FileRecord:
        """Keep an uploaded and inspected file and enter it in the catalog.

        Raises:
            APIError: `queue_full`, with `Retry-After`, or `storage_quota_exceeded`; nothing is kept then.
            Unavailable: store or catalog cannot take it now, or servers of another revision answer; nothing is kept
                then.
        """
        is_document = upload.purpose in DOCUMENTS
        of_stream = upload.tenant.startswith(STREAM_PREFIX)  # it reads more coarsely when it waits, and loses nothing
        add = functools.partial(
            self.catalog.add_file,
            replace(upload, trace=tracing.traceparent()),
            "" if is_document else self._revisions.name(upload.sha256),
            queue_limit=_ENDLESS if of_stream else self.settings.queue_limit,
            tenant_limit=None if of_stream else self.settings.tenant_queue_limit,
            # A batch's answers are not lost.
            tenant_bytes=None if upload.purpose == "batch_output" else self.settings.tenant_bytes,
            job_attempts=self.settings.job_attempts,
        )
        try:
            record = await self._keeper.enter(temporary, upload, add)
        except QueueFull as error:
            message = f"{error}. Try again in about {error.retry_after} s."
            headers = {"Retry-After": str(error.retry_after)}
            raise APIError(HTTPStatus.TOO_MANY_REQUESTS, "queue_full", message, headers=headers) from error
        except QuotaExceeded as error:
            message = f"There is no room for this file among your files: {error} MB. Delete some of them."
            raise APIError(HTTPStatus.FORBIDDEN, "storage_quota_exceeded", message, param="file") from error
        if not is_document:
            metrics.UPLOADS.labels(str(record.state is VideoState.PROCESSED).lower()).inc()
            metrics.UPLOAD_BYTES.inc(upload.bytes)
        return record

    def check_room(self, more: int) -> None:
        """Check that this server may receive this many bytes of a video, before it does.

        Raises:
            StoreUnavailable: they would cut into the disk reserve.
            OtherModels: the video could not be entered here.
        """
        if self.membership.is_waiting:
            raise OtherModels
        self.store.reserve.check("keep a video", more)

    async def find(self, file_ids: Sequence[str], tenant: str, param: str | None = None) -> list[FileWithAdapter]:
        """The tenant's files and their adapters, in this order: one query, in a thread.

        Raises:
            APIError: `video_not_found`, for the first file that does not exist.
        """
        found = await asyncio.to_thread(self.catalog.find, file_ids, tenant) if file_ids else {}
        for file_id in file_ids:
            if file_id not in found:
                raise video_not_found(file_id, param)
        return [found[file_id] for file_id in file_ids]

    def fetch_video(self, record: FileRecord) -> Path:
        """A file's bytes as a local file. Runs in a thread.

        Raises:
            StoreError: they are missing, or were deleted meanwhile.
            Unavailable: catalog or store cannot be asked now.
        """
        path = self.store.fetch_video(record.video)
        if self.store.is_cache and not self.catalog.named([record.video]):  # it came after it was to be forgotten
            self.store.forget_video(record.video)
            raise StoreError(f"the video {record.video} was deleted a moment ago")
        return path

    def note_use(self, record: FileRecord) -> None:
        """Record that the file was asked about: its idle expiry counts from now."""
        self._used[record.id] = self.catalog.now()

    async def ready(
        self, file_id: str, tenant: str, wait: float, param: str | None = None, known: FileWithAdapter | None = None
    ) -> FileWithAdapter:
        """The file and its adapter once it is processed, waiting up to `wait` seconds.

        Args:
            known: the file as it was found a moment ago.

        Raises:
            APIError: `video_not_found`, `video_failed`, or `video_not_ready` when the time is up.
            OtherModels: the file is answered by servers of another revision.
        """
        started = time.monotonic()
        found = known or (await self.find([file_id], tenant, param))[0]
        check_video(found.file, param)
        self.note_use(found.file)
        if _ends_soon(found.file, self.catalog.now()):
            with suppress(Unavailable):
                await self._note_use()  # before the janitor, another server maybe, ends it
        if found.file.state is VideoState.UPLOADED and wait > 0:
            with suppress(Unavailable):  # then its job keeps its place in the queue
                await asyncio.to_thread(self.catalog.hurry_job, found.file.adapter_name)
        while found.file.state in IN_WORK and (left := started + wait - time.monotonic()) > 0:
            await self.watcher.wait(file_id, left)
            self._refuse_when_stopping()
            self._refuse_others(found.file)
            (found,) = await self.find([file_id], tenant, param)
        record = found.file
        self._refuse_others(record)
        if wait > 0:
            metrics.WAIT_SECONDS.observe(time.monotonic() - started)
        if record.state is VideoState.ERROR:
            raise video_failed(file_id, record.error_code, record.error_message)
        if record.state in IN_WORK:
            raise video_not_ready(file_id, record.state, wait, self.why_not_ready())
        return found

    async def remake(self, adapter: AdapterRecord, error: Exception) -> None:
        """Have an adapter with missing or damaged files made again; videos that use it go back to waiting."""
        logger.warning("making an adapter again: %s", error)
        if await asyncio.to_thread(self.catalog.refers_to, adapter.object):  # else it was deleted meanwhile
            await asyncio.to_thread(self.store.remove_adapter, adapter.object)
        await self._write(self.catalog.forget_adapter, adapter)

    async def remove(self, file_id: str, tenant: str) -> list[Tombstone]:
        """Delete a file: first in the catalog, then all data that no other file uses. Returns what was deleted with it.

        Raises:
            APIError: `video_not_found`.
        """
        removal = await self._write(self.catalog.remove_file, file_id, tenant)
        if removal is None:
            raise video_not_found(file_id)
        doomed: list[Tombstone] = removal.doomed
        await self._keeper.bury(doomed)
        return doomed

    async def change(self, method: Callable[..., Any], *args: Any, **values: Any) -> Any:
        """Run a catalog method that writes; what it returns as deleted is removed from the store."""
        result = await self._write(method, *args, **values)
        if isinstance(result, list):
            await self._keeper.bury(result)
        return result

    async def pin(self, file_id: str, tenant: str, pinned: bool) -> FileRecord:
        """Keep a file from expiring and its adapter in the hot set, or let both go again.

        Raises:
            APIError: `video_not_found`.
        """
        record: FileRecord | None = await self._write(self.catalog.pin_file, file_id, tenant, pinned)
        if record is None:
            raise video_not_found(file_id)
        return record

    def adopt(self) -> None:
        """Bring the catalog to this server's revisions, before anything is answered. Adapters made under others are
        queued to be made again."""
        waiting, failed = self.catalog.adopt(self._revisions.name, self.store.has_video)
        if waiting or failed:
            message = "%d videos were read by other models or in another way and are read again; %d have no bytes left"
            logger.warning(message, waiting, failed)

    def close(self) -> None:
        """Stop the pool, and close store and catalog. Runs in a thread after the last answer has ended."""
        if self.pool is not None:
            self.pool.stop()
        if self._listener is not None:
            self._listener.close()
        for part in (self.janitor, self.forgetting):
            try:
                part.leave()
            except Unavailable as error:
                logger.info("the catalog was not told that this server stops: %s", error)
        self.store.close()
        self.catalog.close()

    def is_ready(self) -> bool:
        """Whether uploads get internalized: a worker is alive, or other processes run the workers."""
        return self.pool is None or self.pool.workers > 0

    def why_not_ready(self) -> str | None:
        """Why uploads wait while no worker is alive, as text for clients; None if a worker is alive."""
        return None if self.is_ready() or self.pool is None else self.pool.why

    @property
    def is_stopping(self) -> bool:
        """Whether the server is shutting down: nothing may wait any more."""
        return self._is_stopping()

    async def maintain(self) -> None:
        """Call `tidy` every few seconds, until cancelled."""
        while True:
            try:
                await self.tidy()
            except Exception:
                logger.exception("maintenance failed and goes on")
            await asyncio.sleep(_MAINTENANCE_SECONDS)

    async def tidy(self) -> None:
        """Record use, remove deleted data, keep growing data within its bounds, refresh gauges, and do what this server
        does for all.

        Raises:
            Unavailable: as `try_all` does.
        """
        steps = (self._note_use, self._keeper.give_back_unused, self.janitor.tidy, self._clean)
        await try_all(*steps, self._keep_in_memory, self._show)

    async def _clean(self) -> None:
        if time.monotonic() - self._cleaned < _CLEANING_SECONDS:
            return
        await asyncio.to_thread(self.store.clear)
        self._cleaned = time.monotonic()
        if time.monotonic() - self._swept >= _SWEEP_SECONDS:
            far = self.janitor.has_duty and await self._write(self.catalog.is_due, "sweep", _SWEEP_SECONDS)
            await asyncio.to_thread(functools.partial(self.store.sweep, self.catalog.named, far=far))
            self._swept = time.monotonic()

    async def _keep_in_memory(self) -> None:
        await asyncio.to_thread(self.residents.keep)
        if self.store.is_cache:
            await asyncio.to_thread(self.store.trim, await asyncio.to_thread(self.catalog.videos_in_work))

    async def _show(self) -> None:
        metrics.READY.labels("workers").set(self.is_ready())
        metrics.READY.labels("catalog").set(self.membership.why_not_ready is None)
        metrics.QUEUE_LIMIT.set(self.settings.queue_limit)
        metrics.WORKERS.set(self.pool.workers if self.pool is not None else 0)
        metrics.FREE_BYTES.set(await asyncio.to_thread(self.store.reserve.free))

    async def _note_use(self) -> None:
        """Write all use since the last call to the catalog, in one transaction."""
        used_files, ago = self._used, self.catalog.now() - time.time()
        used_adapters = {name: at + ago for name, at in self.registry.take_used().items()}
        self._used = {}
        if used_files or used_adapters:
            try:
                await self._write(self.catalog.touch, used_files, used_adapters)
            except Unavailable:
                self._used = {**used_files, **self._used}
                raise

    async def _write(self, method: Callable[..., Any], *args: Any, **values: Any) -> Any:
        """Run a catalog method that may wait for other writers, in a thread reserved for writes."""
        return await asyncio.get_running_loop().run_in_executor(
            self._writers, functools.partial(method, *args, **values)
        )

    def _refuse_others(self, record: FileRecord) -> None:
        """Refuse a file whose adapter this server cannot use, because it was made or is to be made by other models."""
        if record.state is not VideoState.ERROR and record.adapter_name != self._revisions.name(record.sha256):
            raise OtherModels

    def _refuse_when_stopping(self) -> None:
        if self._is_stopping():
            raise shutting_down()


def check_video(record: FileRecord, param: str | None = None) -> None:
    """Refuse a file that is no video. Raises APIError `not_a_video`."""
    if record.is_document:
        message = f"The file '{record.id}' is no video: its purpose is '{record.purpose}'. Name a video."
        raise bad_request("not_a_video", message, param)


def _ends_soon(record: FileRecord, now: float) -> bool:
    """Whether its time is up, unless the present use is written down, before the next one but one is."""
    if record.idle_seconds is None or record.expires_at is None or record.pinned:
        return False
    return record.expires_at - now < 2 * _MAINTENANCE_SECONDS
