"""Turns the videos that a question names into the source of its answer: fetch, wait, compose, and hold it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from f2l_vllm.catalog.states import IN_WORK
from f2l_vllm.catalog.stream_tables import PieceRecord, Span, StreamRecord
from f2l_vllm.catalog.streams import joined
from f2l_vllm.catalog.tables import AdapterRecord, FileRecord, FileWithAdapter
from f2l_vllm.server.chat.compose import AdapterChunks, Composer, PartGone, PartLost
from f2l_vllm.server.chat.request import Mode, Video
from f2l_vllm.server.chat.stretches import pieces_for
from f2l_vllm.server.errors import APIError, bad_request, video_not_found
from f2l_vllm.server.local_videos import LocalVideo, address_of
from f2l_vllm.server.registry import Lease
from f2l_vllm.server.streams.live import LiveStreams
from f2l_vllm.server.streams.pyramid import covered
from f2l_vllm.server.videos.by_url import RemoteVideos
from f2l_vllm.server.videos.service import VideoService, check_video
from f2l_vllm.store.store import StoreError

_ATTEMPTS = 3
_OF_A_PIECE = ("video_not_found", "video_failed", "video_not_ready")


@dataclass(frozen=True)
class RequestedVideo:
    """A video as the question names it, the caller's file with it, and its adapter if that is known too.

    `stream`, `piece`: it is this piece of a stream, one of several that the question's one video stands for.
    """

    video: Video
    record: FileRecord
    adapter: AdapterRecord | None = None
    stream: StreamRecord | None = None
    piece: PieceRecord | None = None


@dataclass
class AnswerSource:
    """What one question is answered from; the response shows `details` in `f2l`."""

    mode: Mode
    details: dict[str, Any] = field(default_factory=dict)
    lease: Lease | None = None
    visual_tokens_avoided: int = 0

    def release(self) -> None:
        """Give the adapter up when the question has ended."""
        if self.lease is not None:
            self.lease.release()


class Asking:
    """Finds sources for the chat and completion handlers. Lives on the API server's event loop."""

    def __init__(self, service: VideoService, composer: Composer, live: LiveStreams) -> None:
        self._service = service
        self._live = live
        self._composer = composer
        self._remote = RemoteVideos(service)

    @property
    def service(self) -> VideoService:
        """The service that holds the videos."""
        return self._service

    async def find(self, videos: Sequence[Video], tenant: str) -> list[RequestedVideo]:
        """The caller's file for every video; for a stream, those of the pieces that its stretch is answered from.
        Videos named by address are fetched in parallel.

        Raises:
            APIError: `video_not_found`, `stream_not_found`, `span_not_available`, `stream_is_empty`, `too_many_videos`,
                and those of `RemoteVideos.file`.
        """
        named: list[RequestedVideo] = []
        files = [video for video in videos if not video.is_stream]
        found = dict(zip(files, await self._files(files, tenant), strict=True))
        for video in videos:
            if video in found:
                named.append(found[video])
            else:
                named += await self._stream(video, tenant, self._composer.most - len(files), ready_only=False)
        return named

    async def prepare(self, stream: StreamRecord) -> None:
        """Compose and load what a question about the stream's window is answered from, if it were asked now.

        Raises:
            APIError, Unavailable: it cannot be composed or loaded now.
        """
        named = await self._stream(Video(file_id=stream.id), stream.tenant, self._composer.most, ready_only=True)
        with suppress(PartLost, PartGone):
            (await self._composer.lease([await self._part(one, stream.tenant, 0.0, None) for one in named])).release()

    async def _stream(self, video: Video, tenant: str, most: int, *, ready_only: bool) -> list[RequestedVideo]:
        stream = await self._live.find(video.file_id or "", tenant, "model")
        pieces = await self._live.pieces(stream)
        if not pieces and stream.file_id is not None:  # it has become a file
            return await self._files([replace(video, file_id=stream.file_id)], tenant)
        chosen = pieces_for(stream, pieces, video.span, max(1, most), self._composer.count, ready_only=ready_only)
        return [
            RequestedVideo(video, piece.file, piece.adapter, stream, piece)
            for piece in chosen
            if piece.file is not None
        ]

    async def _files(self, videos: Sequence[Video], tenant: str) -> list[RequestedVideo]:
        ids = [video.file_id for video in videos if video.file_id is not None]
        files = await self._service.find(ids, tenant, "messages")  # first, so that a wrong id costs no fetch
        for one in files:
            check_video(one.file, "messages")
        addresses = {video.url: video.filename for video in videos if video.url is not None}
        if addresses:  # do not fetch more than there is room for
            self._composer.check(len({one.file.sha256 for one in files} | addresses.keys()), len(videos))
        fetched = await asyncio.gather(*(self._remote.file(url, tenant, name) for url, name in addresses.items()))
        found: dict[str | None, FileWithAdapter] = {one.file.id: one for one in files}
        records = dict(zip(addresses, fetched, strict=True))
        return [
            RequestedVideo(video, found[video.file_id].file, found[video.file_id].adapter)
            if video.url is None
            else RequestedVideo(video, records[video.url])
            for video in videos
        ]

    async def adapter(
        self, named: Sequence[RequestedVideo], tenant: str, wait: float, mode: Mode = "adapter"
    ) -> AnswerSource:
        """Hold the adapter of these videos, composed if there are several. Damaged adapters are made again first.

        Raises:
            APIError: those of `VideoService.ready`, `Composer.choose` and `Composer.check`.
        """
        self._composer.check(len({one.record.sha256 for one in named}), len(named))  # at least one chunk each
        deadline, waited = time.monotonic() + wait, 0.0
        for attempt in range(_ATTEMPTS):
            if attempt and any(one.stream is not None for one in named):  # its pieces change all the time
                named = await self._again(named, tenant, ready_only=False)
            parts: list[AdapterChunks] = []
            started = time.monotonic()
            try:
                for one in named:
                    known = (
                        FileWithAdapter(one.record, one.adapter) if one.adapter is not None and not attempt else None
                    )
                    parts.append(await self._part(one, tenant, max(0.0, deadline - time.monotonic()), known))
            except APIError as error:
                # A piece was dropped for a coarser one, cannot be read, or takes too long: answer from what is there.
                if not any(one.stream is not None for one in named) or error.code not in _OF_A_PIECE:
                    raise
                named = await self._again(named, tenant, ready_only=time.monotonic() >= deadline)
                parts = [await self._part(one, tenant, max(0.0, deadline - time.monotonic()), None) for one in named]
            if attempt or any(one.record.state in IN_WORK for one in named):
                waited += time.monotonic() - started
            try:
                lease = await self._composer.lease(parts)
            except PartLost as lost:
                await self._service.remake(lost.record, lost)
            except PartGone:
                pass
            else:
                return _from_adapter(mode, named, parts, lease, waited, self._service.catalog.now())
        message = "The videos' adapters are damaged each time they are made: check the disk that holds F2L_HOME."
        raise APIError(HTTPStatus.INTERNAL_SERVER_ERROR, "adapter_damaged", message)

    async def _again(
        self, named: Sequence[RequestedVideo], tenant: str, *, ready_only: bool
    ) -> Sequence[RequestedVideo]:
        """The same videos, with the pieces that their streams have now."""
        found: list[RequestedVideo] = []
        streams = list(dict.fromkeys(one.video for one in named if one.stream is not None))
        others = [one for one in named if one.stream is None]
        for video in dict.fromkeys(one.video for one in named):
            if video in streams:
                found += await self._stream(video, tenant, self._composer.most - len(others), ready_only=ready_only)
            else:
                found += [one for one in others if one.video == video]
        return found

    async def frames(self, named: Sequence[RequestedVideo]) -> dict[Video, str]:
        """Addresses by which vLLM reads the frames of these videos in this request. Waits for no adapter.

        Raises:
            APIError: `video_too_large_for_frames`.
        """
        cap = self._service.settings.max_frames_bytes
        if sum(one.record.bytes for one in named) > cap:
            message = f"Videos above {cap / 1e6:.0f} MB are answered from their adapter only: leave out f2l.mode."
            raise bad_request("video_too_large_for_frames", message, "f2l")
        for one in named:
            self._service.note_use(one.record)
        paths = {one.video: await asyncio.to_thread(self._path, one.record) for one in named}
        return {one.video: address_of(LocalVideo(paths[one.video], one.record.sha256)) for one in named}

    async def _part(
        self, one: RequestedVideo, tenant: str, wait: float, known: FileWithAdapter | None
    ) -> AdapterChunks:
        file_id = one.record.id
        if one.stream is not None and one.piece is not None:
            found = await self._service.ready(file_id, one.stream.id, wait, "messages", known)
            if found.adapter is None:
                raise video_not_found(file_id, "messages")
            return replace(self._composer.choose(found.adapter, None, file_id), covered=one.piece.spans)
        found = await self._service.ready(file_id, tenant, wait, "messages", known)
        if found.adapter is None:
            raise video_not_found(file_id, "messages")  # deleted a moment ago
        return self._composer.choose(found.adapter, one.video.span, file_id)

    def _path(self, record: FileRecord) -> Path:
        """Runs in a thread."""
        try:
            return self._service.fetch_video(record)
        except StoreError as error:
            raise video_not_found(record.id, "messages") from error  # deleted between look-up and read


def from_frames(named: Sequence[RequestedVideo]) -> AnswerSource:
    """The source of an answer from frames alone."""
    videos = [{"file_id": one.record.id} for one in named]
    return AnswerSource(
        "frames", {"mode": "frames", "videos": videos, "visual_tokens_avoided": 0, "waited_seconds": 0.0}
    )


def _from_adapter(
    mode: Mode,
    named: Sequence[RequestedVideo],
    parts: Sequence[AdapterChunks],
    lease: Lease,
    waited: float,
    now: float,
) -> AnswerSource:
    avoided = sum(part.visual_tokens for part in parts) if mode == "adapter" else 0
    details = {
        "mode": mode,
        "adapter": lease.adapter.name,
        "rank": lease.adapter.rank,
        "videos": _all_described(named, parts),
        "visual_tokens_avoided": avoided,
        "waited_seconds": round(waited, 3),
    }
    if pieces := [one.piece for one in named if one.piece is not None]:
        details["covered"] = _rounded(covered(pieces))
        details["age_seconds"] = round(max(0.0, now - max(piece.end for piece in pieces)), 3)
    return AnswerSource(mode, details, lease, avoided)


def _all_described(named: Sequence[RequestedVideo], parts: Sequence[AdapterChunks]) -> list[Mapping[str, Any]]:
    """Each video once; a stream with all of its pieces, in seconds since it began."""
    described: dict[str, dict[str, Any]] = {}
    known: dict[str, list[Span]] = {}
    for one, part in zip(named, parts, strict=True):
        if one.stream is None:
            found: dict[str, Any] = {"file_id": one.record.id, "adapter": part.record.name}
            key, origin = f"{one.record.id} {one.video.span}", 0.0
        else:
            found, key = {"stream_id": one.stream.id}, f"{one.stream.id} {one.video.span}"
            origin = one.stream.origin or 0.0
        known.setdefault(key, []).extend((start - origin, end - origin) for start, end in part.covered)
        spans = known[key] if one.stream is None else joined(known[key])
        described[key] = {**found, "covered": _rounded(spans)}
    return list(described.values())


def _rounded(spans: Iterable[Sequence[float]]) -> list[list[float]]:
    return [[round(start, 3), round(end, 3)] for start, end in spans]
