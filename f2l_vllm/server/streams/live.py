"""The live streams of one API server: takes segments, has them read, and keeps each stream's pieces few.

A stream's state is the catalog's. The server that receives a segment sees it through; one server of all, by a duty,
looks after what others left behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from f2l_vllm.catalog.states import IN_WORK, VideoState
from f2l_vllm.catalog.stream_tables import PieceRecord, StreamRecord, StreamState
from f2l_vllm.catalog.streams import LATE_SECONDS, StreamEnded, TooManyStreams, file_of_parts
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.server import metrics
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.streams import pyramid
from f2l_vllm.server.streams.clips import FRAMES, write_clip
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.server.videos.uploads import inspecting, inspectors
from f2l_vllm.store.errors import CatalogBusy, Unavailable
from f2l_vllm.store.store import StoreError
from f2l_vllm.video.decoder import DecodeLimits, IsolatedDecoder
from f2l_vllm.video.errors import VideoError

logger = logging.getLogger(__name__)
_DUTY = "streams"
_ROUND_SECONDS = 2.0
_READ_SECONDS = 600.0  # a segment is followed until it is read, for so long
_TURN_SECONDS = 5.0  # that a segment waits for one that began to arrive before and does not end
_ATTEMPTS, _AGAIN_SECONDS = 5, 0.5  # at entering a segment while the catalog is busy
_MADE_AT_ONCE = 4  # coarser clips, until it is looked again at what has come
_NICE = 10  # coarser clips are nobody's answer yet
_FILE_FRAMES = 2048  # of the file that a stream becomes


class LiveStreams:
    """Lives on the API server's event loop.

    Attributes:
        has_duty: whether this server looks after all streams.
        prepare: composes what a question about a stream's window is answered from, before it is asked.
    """

    def __init__(self, service: VideoService) -> None:
        self._service, self._catalog = service, service.catalog
        self._limits, self._kept = service.settings.video_limits, service.settings.kept_video_limits
        self._decoder = IsolatedDecoder(DecodeLimits(seconds=service.settings.decode_seconds, nice=_NICE))
        self._clips = ThreadPoolExecutor(1, "f2l-clips")
        self._tending: dict[str, bool] = {}  # by stream; whether it has to be tended once more
        self._arriving: dict[
            tuple[str, str], asyncio.Event
        ] = {}  # by stream, set when the last one that began to arrive is here
        self._tasks: set[asyncio.Task[None]] = set()
        self.has_duty = False
        self.prepare: Callable[[StreamRecord], Awaitable[None]] | None = None

    @property
    def service(self) -> VideoService:
        """Where the pieces' files are."""
        return self._service

    # The streams

    async def begin(self, tenant: str, values: dict[str, Any]) -> StreamRecord:
        """Enter a live stream.

        Raises:
            APIError: `too_many_streams`.
        """
        limit = self._service.settings.max_streams
        try:
            stream: StreamRecord = await self._service.change(self._catalog.add_stream, tenant, values, limit=limit)
            return stream
        except TooManyStreams as error:
            message = f"{limit} of your streams are live: end or delete some with DELETE /v1/streams/{{id}}."
            raise APIError(HTTPStatus.TOO_MANY_REQUESTS, "too_many_streams", message) from error

    async def find(self, stream_id: str, tenant: str, param: str | None = None) -> StreamRecord:
        """The tenant's stream.

        Raises:
            APIError: `stream_not_found`.
        """
        stream = await asyncio.to_thread(self._catalog.stream, stream_id, tenant)
        if stream is None:
            message = f"No stream with the id '{stream_id[:80]}' exists: begin one with POST /v1/streams."
            raise APIError(HTTPStatus.NOT_FOUND, "stream_not_found", message, param=param)
        return stream

    async def pieces(self, stream: StreamRecord) -> list[PieceRecord]:
        """What there is of a stream, oldest first."""
        return await asyncio.to_thread(self._catalog.pieces, stream.id)

    def to_make(self, stream: StreamRecord, pieces: Sequence[PieceRecord]) -> list[pyramid.Node]:
        """The coarser pieces whose time has come, none longer than this server's workers read."""
        reading = self._service.settings.reading
        longest = pyramid.LONGEST_SECONDS
        if reading.chunk_seconds is not None:
            longest = reading.max_chunks * reading.chunk_seconds
        elif (
            reading.chunk_frames is not None
        ):  # at the model's own rate, if none is set, which this process cannot know
            longest = reading.max_chunks * reading.chunk_frames / reading.fps if reading.fps else 0.0
        return pyramid.to_make(stream, pieces, longest)

    async def end(self, stream: StreamRecord) -> StreamRecord:
        """Take no more segments. It becomes a file when those that are here are read, if it was meant to."""
        ended: StreamRecord = await self._service.change(self._catalog.end_stream, stream)
        self._start(self.tend(ended))
        return ended

    async def remove(self, stream: StreamRecord) -> None:
        """Delete a stream and all that is there of it, except the file that it has become."""
        await self._service.change(self._catalog.remove_stream, stream)

    # Its segments

    @asynccontextmanager
    async def turn(self, tenant: str, stream_id: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """While a segment arrives; it gives a call that waits for those that began to arrive before. They come one
        after the other, but hasty senders do not wait for an answer."""
        key, mine = (tenant, stream_id), asyncio.Event()
        before, self._arriving[key] = self._arriving.get(key), mine

        async def mine_has_come() -> None:
            if before is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_TURN_SECONDS):
                        await before.wait()

        try:
            yield mine_has_come
        finally:
            mine.set()
            if self._arriving.get(key) is mine:
                del self._arriving[key]

    async def add(
        self, stream: StreamRecord, name: str, temporary: Path, size: int, sha256: str
    ) -> tuple[PieceRecord, bool]:
        """Take a segment, a whole video file, and have it read; with whether it is new.

        Raises:
            APIError: what is wrong with the segment; `stream_ended`; `queue_full`.
            Unavailable: store or catalog cannot take it now.
        """
        received_at = self._catalog.now()
        begins, seconds = await self._stamps(temporary)
        for _ in range(_ATTEMPTS):  # its sender may not hear that it should try again
            with suppress(CatalogBusy):
                return await self._enter(stream, name, temporary, (size, sha256), (begins, seconds), received_at)
            await asyncio.sleep(_AGAIN_SECONDS)
        return await self._enter(stream, name, temporary, (size, sha256), (begins, seconds), received_at)

    async def _enter(
        self,
        stream: StreamRecord,
        name: str,
        temporary: Path,
        content: tuple[int, str],
        stamps: tuple[float, float],
        received_at: float,
    ) -> tuple[PieceRecord, bool]:
        (size, sha256), (begins, seconds) = content, stamps
        try:
            piece, is_new = await self._service.change(
                self._catalog.add_segment, stream, name, sha256, begins, seconds, received_at
            )
        except StreamEnded as error:
            raise stream_ended(stream) from error
        if piece.file is None:
            upload = Upload(stream.id, sha256, size, name or "segment", "vision", file_id=piece.file_id)
            file = await self._service.enter(temporary, upload)
            self._start(self._follow(stream, replace(piece, file=file)))
        if not is_new:
            metrics.STREAM_SEGMENTS.labels("repeated").inc()
        return piece, is_new

    async def _stamps(self, path: Path) -> tuple[float, float]:
        def stamps() -> tuple[float, float]:
            with inspectors().lend() as decoder:
                return decoder.stamps(path, self._limits)

        try:
            return await asyncio.get_running_loop().run_in_executor(inspecting(), stamps)
        except VideoError as error:
            raise APIError(HTTPStatus.BAD_REQUEST, error.code, error.message) from None

    async def _follow(self, stream: StreamRecord, piece: PieceRecord) -> None:
        """See a segment through until it can be asked about."""
        if piece.file is not None and piece.file.state in IN_WORK:
            await self._service.watcher.wait(piece.file_id, _READ_SECONDS)
        known = await asyncio.to_thread(self._catalog.stream, stream.id, stream.tenant)
        if known is None or self._service.is_stopping:
            return
        state = (await asyncio.to_thread(self._catalog.states, [piece.file_id])).get(piece.file_id)
        if state is VideoState.PROCESSED:
            await self._prepare(known)
            metrics.STREAM_FRESHNESS.observe(self._catalog.now() - piece.received_at)
        outcome = {VideoState.PROCESSED: "read", VideoState.ERROR: "failed"}.get(state or VideoState.DELETED, "coarser")
        metrics.STREAM_SEGMENTS.labels(outcome).inc()
        await self.tend(known)

    async def _prepare(self, stream: StreamRecord) -> None:
        if self.prepare is None:
            return
        try:
            await self.prepare(stream)
        except (APIError, Unavailable) as error:
            logger.info("the window of %s is composed when it is asked about: %s", stream.id, error)

    # Its pieces

    async def tend(self, stream: StreamRecord) -> None:
        """Make the coarser pieces whose time has come, and drop what they stand for. Done once at a time; a call
        meanwhile has it done once more."""
        if stream.id in self._tending:
            self._tending[stream.id] = True
            return
        self._tending[stream.id] = True
        try:
            while self._tending[stream.id] and not self._service.is_stopping:
                self._tending[stream.id] = False
                known = await asyncio.to_thread(self._catalog.stream, stream.id, stream.tenant)
                if known is not None:
                    await self._tend(known)
        except (Unavailable, StoreError, FileNotFoundError, APIError) as error:
            logger.info("%s is tended later: %s", stream.id, error)
        finally:
            del self._tending[stream.id]

    async def _tend(self, stream: StreamRecord) -> None:
        pieces = await self.pieces(stream)
        made = self.to_make(stream, pieces)[:_MADE_AT_ONCE]
        behind = pyramid.is_behind(pieces)
        for node in made:
            if len(node.parts) == 1:
                await self._service.change(self._catalog.promote_piece, node.parts[0])
            else:
                await self._make(stream, node, background=not behind)
        if made:
            self._tending[stream.id] = True
            pieces = await self.pieces(stream)
        for name in pyramid.to_hurry(pieces):
            await self._service.change(self._catalog.hurry_job, name)
        if dropped := pyramid.to_drop(stream, pieces, self._catalog.now()):
            await self._service.change(self._catalog.drop_pieces, dropped)
            pieces = await self.pieces(stream)
        if stream.state is StreamState.ENDED and not made:
            await self._finish(stream, pieces)

    async def _make(self, stream: StreamRecord, node: pyramid.Node, *, background: bool) -> None:
        file_id = file_of_parts(stream, node.parts)
        name = f"{stream.name or stream.id} {node.level}.{node.slot}.mp4"
        upload = Upload(stream.id, "", 0, name, "vision", file_id=file_id, background=background)
        try:
            sha256 = await self._join(node.parts, upload, FRAMES)
        except VideoError as error:  # what the worker says of the parts, too
            logger.warning("a coarser piece of %s cannot be made: %s", stream.id, error)
            await self._service.change(self._catalog.promote_piece, node.parts[-1])
            return
        piece = await self._service.change(self._catalog.add_piece, stream, node.level, node.slot, node.parts, sha256)
        self._start(self._follow_coarse(stream, piece))

    async def _follow_coarse(self, stream: StreamRecord, piece: PieceRecord) -> None:
        if piece.file is not None and piece.file.state in IN_WORK:
            await self._service.watcher.wait(piece.file_id, _READ_SECONDS)
        if not self._service.is_stopping:
            await self.tend(stream)

    async def _join(self, parts: Sequence[PieceRecord], upload: Upload, frames: int) -> str:
        """Enter a file with the frames of these pieces; returns the SHA-256 of its bytes."""
        run = asyncio.get_running_loop().run_in_executor
        store = self._service.store
        temporary = store.temporary()
        try:
            sha256, size = await run(self._clips, partial(self._write, parts, temporary, frames))
            self._service.check_room(0)
            await self._service.enter(temporary, replace(upload, sha256=sha256, bytes=size))
            return sha256
        finally:
            await asyncio.to_thread(store.discard, temporary)

    def _write(self, parts: Sequence[PieceRecord], target: Path, frames: int) -> tuple[str, int]:
        """Runs in a thread."""
        start = parts[0].start
        files = [part.file for part in parts]
        paths = [self._service.fetch_video(file) for file in files if file is not None]
        placed = [(path, part.start - start, part.end - start) for path, part in zip(paths, parts, strict=True)]
        write_clip(placed, target, self._decoder, self._kept, frames)
        data = target.read_bytes()
        return hashlib.sha256(data).hexdigest(), len(data)

    async def _finish(self, stream: StreamRecord, pieces: Sequence[PieceRecord]) -> None:
        """Make a file of a stream that has ended and is read, and drop its pieces when the file can be asked about."""
        late = (stream.ended_at or 0.0) + LATE_SECONDS > self._catalog.now()
        if late or any(pyramid.is_in_work(piece) for piece in pieces):
            return
        if stream.becomes_file and stream.file_id is None and (parts := pyramid.finest(pieces)):
            file_id = file_of_parts(stream, parts)
            chapters = [[piece.start, piece.end] for piece in parts]
            name = f"{stream.name or stream.id}.mp4"
            upload = Upload(stream.tenant, "", 0, name, "vision", stream.expires_seconds, file_id=file_id)
            await self._join(parts, upload, min(_FILE_FRAMES, FRAMES * len(parts)))
            details = {**stream.details, "chapters": chapters}
            await self._service.change(self._catalog.note_stream, stream, file_id=file_id, details=details)
            stream = replace(stream, file_id=file_id)
        if stream.file_id is not None:
            state = (await asyncio.to_thread(self._catalog.states, [stream.file_id])).get(stream.file_id)
            if state in IN_WORK or state is VideoState.ERROR:  # what could not become a file stays as it is
                return
        if pieces:
            await self._service.change(self._catalog.drop_pieces, pieces)

    # What one server does for all

    async def run(self) -> None:
        """Look after all streams, until cancelled."""
        await self._service.membership.appointed.wait()
        while True:
            try:
                await self.look()
            except Unavailable as error:
                logger.info("streams are looked after later: %s", error)
            except Exception:
                logger.exception("streams are looked after later")
            await asyncio.sleep(_ROUND_SECONDS)

    async def look(self) -> None:
        """End streams that nothing comes from, and tend those that others left, if this server has the duty.

        Raises:
            Unavailable: the catalog cannot be asked.
        """
        if self._service.is_stopping or self._service.membership.is_waiting:
            self.has_duty = False
            return
        self.has_duty = await self._service.change(self._catalog.hold_duty, _DUTY, self._service.forgetting.name)
        if not self.has_duty:
            metrics.STREAMS.set(0)
            return
        await self._service.change(self._catalog.drop_orphans)
        known = await asyncio.to_thread(self._catalog.open_streams)
        metrics.STREAMS.set(sum(stream.state is StreamState.LIVE for stream in known))
        now = self._catalog.now()
        for stream in known:
            last = stream.received_at or stream.created_at
            if stream.state is StreamState.LIVE and stream.source is None and last < now - stream.idle_seconds:
                stream = await self._service.change(self._catalog.end_stream, stream)
            await self.tend(stream)

    def close(self) -> None:
        """End what runs. Runs in a thread."""
        self._decoder.close()
        self._clips.shutdown(wait=False, cancel_futures=True)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("a stream's segment is looked after later", exc_info=error)

        task.add_done_callback(ended)


def stream_is_empty(stream: StreamRecord) -> APIError:
    """409: it has no segment yet."""
    message = f"The stream '{stream.id}' has no segment that can be asked about yet: ask again in some seconds."
    return APIError(HTTPStatus.CONFLICT, "stream_is_empty", message, headers={"Retry-After": "5"})


def stream_ended(stream: StreamRecord) -> APIError:
    """409: no segment may come any more."""
    message = f"The stream '{stream.id}' has ended and takes no more segments: begin another with POST /v1/streams."
    return APIError(HTTPStatus.CONFLICT, "stream_ended", message)
