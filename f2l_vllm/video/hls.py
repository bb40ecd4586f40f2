"""Reads an HLS stream: playlists and segments, each from an address that the policy allows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import FetchPolicy, fetch, unreachable
from f2l_vllm.video.playlist import HlsSegment, MediaPlaylist, Variant, choose, parse_playlist

_PLAYLIST_BYTES = 4 << 20
_HEADER_BYTES = 1 << 20
_FROM_THE_END = 3  # where reading a live stream begins, as RFC 8216 advises
_TRIES = 3  # of one segment
_STALLED = 5  # target durations without a new segment
_SHORTEST_WAIT = 0.1


@dataclass(frozen=True)
class Piece:
    """A segment's file, which the reader of it deletes.

    Attributes:
        header: the bytes of its initialisation section; None for MPEG-TS.
        after_gap: segments between it and the piece before are missing.
    """

    segment: HlsSegment
    file: Path
    header: bytes | None
    after_gap: bool


class HlsReader:
    """The segments of a stream one after another, each once, also over lost connections."""

    def __init__(
        self,
        address: str,
        policy: FetchPolicy,
        folder: Path,
        *,
        seconds: float,
        segment_bytes: int,
        on_lost: Callable[[str], None],
    ) -> None:
        """`seconds` is the time for a playlist or a segment; `on_lost` is told when segments could not be read."""
        self._address = address
        self._policy = replace(policy, seconds=seconds)
        self._segment_bytes = segment_bytes
        self._folder = folder
        self._on_lost = on_lost
        self._media: str | None = None
        self._next: int | None = None
        self._playlist: MediaPlaylist | None = None
        self._read_at = 0.0
        self._news_at = 0.0
        self._failures = 0
        self._header: tuple[str, bytes] | None = None
        self._broken = False

    async def next(self) -> Piece | None:
        """The next segment; None when the stream has ended.

        Raises:
            VideoError: the fetch's, or `unsupported_playlist`. After `url_unreachable` one may call again.
        """
        while True:
            if self._playlist is None:
                await self._load()
            playlist = self._playlist
            assert playlist is not None
            for segment in playlist.segments:
                if self._next is not None and segment.sequence < self._next:
                    continue
                piece = await self._fetch(segment)
                if piece is not None:
                    return piece
            if playlist.ended:
                return None
            waited = time.monotonic() - self._news_at
            if waited > _STALLED * max(playlist.target, 1.0):
                self._forget()
                raise unreachable(self._address.split("/")[2], "its playlist has no new segments")
            pause = playlist.target if self._read_at == self._news_at else playlist.target / 2
            await asyncio.sleep(max(_SHORTEST_WAIT, pause - (time.monotonic() - self._read_at)))
            await self._load()

    async def _load(self) -> None:
        try:
            found = await self._parsed(self._media or self._address)
            if isinstance(found, list):
                self._media = choose(found).address
                found = await self._parsed(self._media)
            if isinstance(found, list):
                raise VideoError("unsupported_playlist", "The HLS playlist names another that names others again.")
        except BaseException:
            self._forget()
            raise
        self._read_at = time.monotonic()
        old, self._playlist = self._playlist, found
        if old is None or found.segments[-1:] != old.segments[-1:]:
            self._news_at = self._read_at
        if not found.segments:
            return
        first, last = found.segments[0].sequence, found.segments[-1].sequence
        if self._next is None:
            self._next = first if found.ended else max(first, last - _FROM_THE_END + 1)
        elif self._next < first:
            self._lose(first - self._next, "had left the playlist before they were read")
            self._next = first
        elif self._next > last + 1:  # the server began anew
            self._next, self._broken = first, True

    def _forget(self) -> None:
        self._playlist = self._media = None

    def _lose(self, count: int, why: str) -> None:
        self._broken = True
        self._on_lost(f"{count} segments of the HLS stream {why}")

    async def _parsed(self, address: str) -> MediaPlaylist | list[Variant]:
        file = self._folder / "playlist.part"
        try:
            await fetch(address, file, replace(self._policy, max_bytes=_PLAYLIST_BYTES))
            text = (await asyncio.to_thread(file.read_bytes)).decode("utf-8", "replace")
        finally:
            file.unlink(missing_ok=True)
        return await asyncio.to_thread(parse_playlist, text, address)

    async def _fetch(self, segment: HlsSegment) -> Piece | None:
        file = self._folder / f"fetched-{segment.sequence}.part"
        try:
            header = await self._initialisation(segment.header)
            await fetch(segment.address, file, replace(self._policy, max_bytes=self._segment_bytes))
        except VideoError as error:
            self._failures += 1
            if error.code != "url_unreachable" or self._failures < _TRIES:
                self._forget()
                raise
            self._failures, self._next = 0, segment.sequence + 1
            self._lose(1, f"could not be read: {error.message}")
            return None
        self._failures, self._next = 0, segment.sequence + 1
        after_gap, self._broken = self._broken, False
        return Piece(segment, file, header, after_gap)

    async def _initialisation(self, address: str | None) -> bytes | None:
        if address is None:
            return None
        if self._header is None or self._header[0] != address:
            file = self._folder / "header.part"
            try:
                await fetch(address, file, replace(self._policy, max_bytes=_HEADER_BYTES))
                self._header = (address, await asyncio.to_thread(file.read_bytes))
            finally:
                file.unlink(missing_ok=True)
        return self._header[1]
