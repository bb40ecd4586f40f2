"""Reads a live address, RTSP, SRT or HLS, and gives it out as segments of a few seconds.

This machine connects to whatever a client names, so names are looked up once and checked as `fetch` does it, and what
comes is taken apart in a process with limits, which connects to nothing but the checked address.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from f2l_vllm.video.cutting import Clock
from f2l_vllm.video.errors import CODES, VideoError
from f2l_vllm.video.fetch import FetchPolicy, parse, resolve, unreachable
from f2l_vllm.video.hls import HlsReader, Piece

_PORTS = {"rtsp": 554, "rtsps": 322}
_SRT_OPTIONS = {"streamid", "passphrase", "pbkeylen", "latency", "mode"}
_TRIED_AGAIN = ("url_unreachable", "decode_failed")
_LONGEST_LINE = 1 << 16
_PIECE_BYTES = 1 << 20
OnState = Callable[[str, str | None], None]


@dataclass(frozen=True)
class PullLimits:
    """Limits of one pulled stream. Times are in seconds.

    Attributes:
        memory_bytes: address space of the reading process.
        cpu_seconds: of the reading process, for one segment.
        segment_bytes: of one segment, here and at the source; a longer one is cut where it is.
        longest: a segment without a key frame is cut where it is; as a multiple of the segment's seconds.
        open_seconds, read_seconds: to connect; and that the source may be silent.
        first_delay, longest_delay: before connecting again; it doubles.
        nice: how much the process gives way to others, 0 to 19.
    """

    memory_bytes: int = 2 << 30
    cpu_seconds: float = 30.0
    segment_bytes: int = 128 << 20
    longest: float = 6.0
    open_seconds: float = 10.0
    read_seconds: float = 10.0
    first_delay: float = 0.5
    longest_delay: float = 10.0
    nice: int = 0


class Puller:
    """One live source. `segments` is used once."""

    def __init__(
        self,
        address: str,
        seconds: float,
        policy: FetchPolicy,
        folder: Path,
        *,
        on_state: OnState = lambda _state, _why: None,
        limits: PullLimits | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            address: `rtsp://`, `rtsps://`, `srt://`, or `http(s)://` of an HLS playlist.
            seconds: a segment ends at the first key frame after so many.
            policy: the hosts that are allowed, as for `fetch`.
            folder: exists; segments are written there, by this process alone.
            on_state: called with `connecting`, `connected` or `reconnecting`, and why: after `connected` it says
                what was lost, if anything.

        Raises:
            VideoError: `unsupported_address`, `invalid_url`.
        """
        check_address(address)
        self._address, self._seconds, self._policy, self._folder = address, seconds, policy, folder
        self._limits = limits or PullLimits()
        self._on_state = on_state
        self._clock = Clock()
        self._last_at: float | None = None
        self._number = 0
        self._child: Process | None = None
        self._producing: asyncio.Task[None] | None = None
        self._reader: HlsReader | None = None
        self._pending: Piece | None = None
        self._connected = False

    async def segments(self) -> AsyncIterator[Path]:
        """Finished MPEG-TS files with the video alone, which the consumer deletes.

        They begin at key frames, unless the source has none, and keep the source's timestamps; when these begin anew,
        they continue from the segment before, after a lost connection by this machine's clock. Ends when the source
        is at its end or `close` is called; reads ahead by one segment.

        Raises:
            VideoError: what does not pass by trying again: `url_not_allowed`, `unsupported_playlist`,
                `unsupported_codec`, `no_video_stream` …
        """
        found: asyncio.Queue[Path | None] = asyncio.Queue(1)
        self._producing = asyncio.create_task(self._produce(found))
        try:
            while (path := await found.get()) is not None:
                yield path
            with suppress(asyncio.CancelledError):
                await self._producing
        finally:
            await self.close()

    async def close(self) -> None:
        """End the reading process at once."""
        if self._producing is not None and not self._producing.done():
            self._producing.cancel()
            with suppress(asyncio.CancelledError, VideoError):
                await self._producing
        for part in self._folder.glob("*.part"):
            part.unlink(missing_ok=True)

    async def _produce(self, found: asyncio.Queue[Path | None]) -> None:
        delay, state, why = self._limits.first_delay, "connecting", None
        try:
            while True:
                self._connected = False
                self._on_state(state, why)
                try:
                    if await self._connect(found):
                        return
                    why = "the source ended"
                except VideoError as error:
                    if error.code not in _TRIED_AGAIN:
                        raise
                    why = error.message
                if self._connected:
                    delay = self._limits.first_delay
                state = "reconnecting"
                await asyncio.sleep(delay)
                delay = min(2 * delay, self._limits.longest_delay)
        finally:
            await self._end_child()
            if not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                await found.put(None)
            else:
                with suppress(asyncio.QueueFull):
                    found.put_nowait(None)

    async def _connect(self, found: asyncio.Queue[Path | None]) -> bool:
        """Read until the connection ends; whether the source is at its end."""
        scheme = self._address.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return await self._read_hls(found)
        if self._last_at is not None and self._clock.last is not None:
            self._clock.restart += time.monotonic() - self._last_at
        return await self._read(await self._source(scheme), found, None)

    async def _source(self, scheme: str) -> dict[str, Any]:
        parsed, host = parse(self._address, (scheme,))
        port = parsed.port or _PORTS.get(scheme, 0)
        try:
            async with asyncio.timeout(self._limits.open_seconds):
                addresses = list(await resolve(host, port, self._policy))
        except TimeoutError as error:
            raise unreachable(host, "its name was not found in time") from error
        if scheme == "srt":
            address = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
            query = urlencode({**dict(parse_qsl(parsed.query.decode("ascii"))), "mode": "caller"})
            return {
                "kind": "srt",
                "host": host,
                "program": _srt_program(),
                "address": f"srt://{address}:{port}?{query}",
            }
        address = f"rtsp://{parsed.userinfo.decode('ascii')}@" if parsed.userinfo else "rtsp://"
        address += "127.0.0.1:PORT" + parsed.raw_path.decode("ascii")
        source = {"kind": "rtsp", "host": host, "addresses": addresses, "port": port}
        return {**source, "tls": scheme == "rtsps", "address": address}

    async def _read_hls(self, found: asyncio.Queue[Path | None]) -> bool:
        limits = self._limits
        if self._reader is None:
            self._reader = HlsReader(
                self._address,
                self._policy,
                self._folder,
                seconds=limits.read_seconds,
                segment_bytes=limits.segment_bytes,
                on_lost=lambda why: self._on_state("connected", why),
            )
        while True:
            piece = self._pending or await self._reader.next()
            if piece is None:
                return True
            self._pending = piece
            self._clock.fresh = piece.segment.new_clock and self._clock.last is not None
            source = {"kind": "stdin", "host": parse(self._address)[1], "format": "mp4" if piece.header else "mpegts"}
            await self._read(source, found, self._reader)

    async def _read(self, source: dict[str, Any], found: asyncio.Queue[Path | None], reader: HlsReader | None) -> bool:
        """Read with a process of its own until it ends; whether the source is at its end."""
        child = await self._start(source, reader is not None)
        feeding = asyncio.create_task(self._feed(child, reader)) if reader is not None else None
        try:
            finished = await self._listen(child, found)
            if feeding is not None:
                await feeding
            return finished
        finally:
            if feeding is not None and not feeding.done():
                feeding.cancel()
                with suppress(asyncio.CancelledError, VideoError):
                    await feeding
            await self._end_child()

    async def _start(self, source: dict[str, Any], fed: bool) -> Process:
        limits = self._limits
        options = {
            "source": source,
            "clock": asdict(self._clock),
            "seconds": self._seconds,
            "longest": self._seconds * limits.longest,
            **{
                name: getattr(limits, name)
                for name in ("memory_bytes", "cpu_seconds", "segment_bytes", "open_seconds", "read_seconds", "nice")
            },
        }
        theirs, ours = os.pipe()
        self._lifeline = open(ours, "wb", buffering=0)  # noqa: SIM115  (nothing is written; see `lifeline`)
        try:
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "f2l_vllm.video.pull_child", json.dumps(options), str(theirs)),
                stdin=PIPE if fed else DEVNULL,
                stdout=PIPE,
                stderr=DEVNULL,
                pass_fds=[theirs],
                env={**os.environ, "MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1"},
                limit=_LONGEST_LINE,
            )
        finally:
            os.close(theirs)
        return self._child

    async def _listen(self, child: Process, found: asyncio.Queue[Path | None]) -> bool:
        assert child.stdout is not None
        try:
            while line := await child.stdout.readline():
                said = json.loads(line)
                if "segment" in said:
                    await found.put(await self._save(child.stdout, said))
                elif "connected" in said:
                    self._connected = True
                    self._on_state("connected", None)
                elif "code" in said:
                    assert said["code"] in CODES
                    raise VideoError(said["code"], str(said["message"]))
                else:
                    return bool(said["finished"])
        except (ValueError, KeyError, TypeError, AssertionError, EOFError) as error:
            # Only a process that a stream has taken over, or that was killed, says such things.
            raise VideoError("decode_failed", "The process that read the stream broke off.") from error
        code = await child.wait()
        raise VideoError("decode_failed", f"The process that read the stream ended (exit code {code}).")

    async def _save(self, stream: asyncio.StreamReader, said: dict[str, Any]) -> Path:
        left = int(said["segment"])
        if not 0 < left <= 2 * self._limits.segment_bytes:
            raise ValueError("a segment of another size than was asked for")
        if said["lost"]:
            self._on_state("connected", f"{int(said['lost'])} frames before a key frame could not be used")
        part = self._folder / f"{self._number:09d}.part"
        with part.open("wb") as file:
            while left:
                data = await stream.read(min(left, _PIECE_BYTES))
                if not data:
                    raise EOFError
                left -= len(data)
                await asyncio.to_thread(file.write, data)
        path = part.with_suffix(".ts")
        part.rename(path)
        self._number += 1
        self._clock = Clock(shift=float(said["shift"]), last=float(said["last"]), restart=float(said["after"]))
        self._last_at = time.monotonic()
        return path

    async def _feed(self, child: Process, reader: HlsReader) -> None:
        """Give the process the HLS segments that continue each other."""
        assert child.stdin is not None
        before: Piece | None = None
        try:
            while True:
                piece, self._pending = self._pending or await reader.next(), None
                if piece is None:
                    return
                if before is not None and _begins_anew(before, piece):
                    self._pending = piece
                    return
                try:
                    if before is None and piece.header is not None:
                        child.stdin.write(piece.header)
                    with piece.file.open("rb") as file:
                        while data := await asyncio.to_thread(file.read, _PIECE_BYTES):
                            child.stdin.write(data)
                            await child.stdin.drain()
                finally:  # a piece that ends the process is not given to the next one
                    piece.file.unlink(missing_ok=True)
                before = piece
        except (BrokenPipeError, ConnectionResetError):
            return  # the process has ended over this piece, and says why
        finally:
            child.stdin.close()

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with suppress(ProcessLookupError):
            child.kill()
        child._transport.close()  # type: ignore[attr-defined]  # its pipes too: with data in them they would stay open
        await child.wait()
        self._lifeline.close()


def check_address(address: str) -> None:
    """Refuse an address that no `Puller` can read, before anything is looked up.

    Raises:
        VideoError: `unsupported_address`, `invalid_url`.
    """
    scheme = address.partition(":")[0].lower()
    if scheme not in (*_PORTS, "srt", "http", "https"):
        raise _unsupported("Live streams are read by rtsp, rtsps, srt, http and https")
    parsed, _ = parse(address, (scheme,))
    if scheme == "srt":
        options = dict(parse_qsl(parsed.query.decode("ascii")))
        if parsed.port is None:
            raise VideoError("invalid_url", "An SRT address needs a port.")
        if not options.keys() <= _SRT_OPTIONS or options.get("mode", "caller") != "caller":
            raise _unsupported("SRT addresses take streamid, passphrase, pbkeylen and latency, and this server calls")
        _srt_program()


def _srt_program() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        raise _unsupported("SRT is read with the program ffmpeg, which is not installed on this server")
    return program


def _begins_anew(before: Piece, piece: Piece) -> bool:
    return piece.segment.new_clock or piece.after_gap or before.segment.header != piece.segment.header


def _unsupported(why: str) -> VideoError:
    return VideoError("unsupported_address", f"The stream's address cannot be read: {why}.")
