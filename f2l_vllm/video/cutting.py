"""Cuts a stream's packets at key frames into MPEG-TS segments, without encoding them again."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import av
from av.bitstream import BitStreamFilterContext
from av.container.output import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from f2l_vllm.video.errors import VideoError

CODECS = ("h264", "hevc", "mpeg2video", "mpeg1video", "mpeg4")  # what MPEG-TS carries
_JUMP_SECONDS = 10.0
_SMALLEST_STEP = 0.001
# The timestamps in the file are those of the packets.
_MUXER = {"mpegts_copyts": "1", "avoid_negative_ts": "disabled", "max_delay": "0"}


@dataclass
class Clock:
    """How a source's timestamps become those of segments; all times are in seconds.

    Attributes:
        shift: what is added to the source's timestamps.
        last: the decoding time of the last packet of the connection before; None for the first connection.
        restart: where the first packet belongs when the source's clock has begun anew.
        fresh: the source's clock is known to have begun anew.
    """

    shift: float = 0.0
    last: float | None = None
    restart: float = 0.0
    fresh: bool = False


@dataclass(frozen=True)
class Cut:
    """A finished segment; `lost` is the number of packets before it that no segment has, for want of a key frame."""

    data: bytes
    start: float
    end: float
    last: float
    after: float
    shift: float
    lost: int


class Cutter:
    """Takes packets of one video stream in decoding order and gives out segments."""

    def __init__(
        self,
        stream: VideoStream,
        clock: Clock,
        *,
        seconds: float,
        longest: float,
        largest: int,
        repeat_headers: bool,
        emit: Callable[[Cut], None],
    ) -> None:
        """A segment ends at the first key frame after `seconds`, or anywhere at `longest` seconds or `largest` bytes.

        Raises:
            VideoError: `unsupported_codec`.
        """
        name = stream.codec_context.name
        if name not in CODECS:
            raise VideoError(
                "unsupported_codec", f"The stream's video is {name}: send H.264 or H.265 (HEVC), which can be cut."
            )
        self._stream = stream
        self._clock = clock
        self._base = float(stream.time_base or 0) or 1 / 90000
        self._seconds, self._longest, self._largest = seconds, longest, largest
        self._emit = emit
        self._filter = _filter(stream, repeat_headers)
        self._shift = round(clock.shift / self._base)
        self._last: int | None = None
        self._step = max(1, round(_SMALLEST_STEP / self._base))
        self._container: OutputContainer | None = None
        self._buffer = io.BytesIO()
        self._start = self._end = 0
        self._lost = 0

    def add(self, packet: Packet) -> None:
        """Take the next packet."""
        for filtered in self._filter.filter(packet) if self._filter else [packet]:
            if filtered.size:
                self._add(filtered)

    def close(self) -> None:
        """Give out what is left."""
        if self._container is None:
            return
        self._container.close()
        self._container = None
        data, self._buffer = self._buffer.getvalue(), io.BytesIO()
        now = self._last or 0
        start, end, last, after, shift = (
            time * self._base for time in (self._start, self._end, now, now + self._step, self._shift)
        )
        lost, self._lost = self._lost, 0
        self._emit(Cut(data, start, end, last, after, shift, lost))

    def _add(self, packet: Packet) -> None:
        pts, dts = packet.pts, packet.dts
        if pts is None and dts is None:
            if self._last is None:
                return
            pts = dts = self._last + self._step - self._shift
        shown, decoded = (dts if pts is None else pts), (pts if dts is None else dts)
        assert shown is not None
        assert decoded is not None
        self._follow(decoded)
        decoded += self._shift
        shown += self._shift
        if self._last is not None:
            if decoded > self._last:
                self._step = min(decoded - self._last, round(1 / self._base))
            decoded = max(decoded, self._last + 1)
        shown = max(shown, decoded)
        self._last = decoded
        packet.pts, packet.dts = shown, decoded
        self._write(packet, shown)

    def _follow(self, decoded: int) -> None:
        """Look after the clock before a packet whose decoding time is this."""
        if self._last is None:
            clock, time = self._clock, (decoded + self._shift) * self._base
            begun_anew = clock.fresh or (clock.last is not None and time <= clock.last)
            if begun_anew or time < 0:
                self._shift = math.ceil(clock.restart / self._base) - decoded
            return
        jump = (decoded + self._shift - self._last) * self._base
        if jump < -1:  # less is a matter of order, not of clocks
            self.close()
            self._shift = self._last + self._step - decoded
        elif jump > _JUMP_SECONDS:
            self.close()

    def _write(self, packet: Packet, shown: int) -> None:
        length = (shown - self._start) * self._base
        if self._container is not None and (
            (packet.is_keyframe and length >= self._seconds)
            or length >= self._longest
            or self._buffer.tell() + packet.size >= self._largest
        ):
            self.close()
        if self._container is None:
            if not packet.is_keyframe:
                self._lost += 1
                return
            self._container = av.open(self._buffer, "w", format="mpegts", options=_MUXER)
            self._out = self._container.add_stream_from_template(self._stream)
            self._start = self._end = shown
        packet.stream = self._out
        self._container.mux(packet)
        self._end = max(self._end, shown + self._step)


def _filter(stream: VideoStream, repeat_headers: bool) -> Any:
    """Gives every key frame what a decoder must know first, which some sources say only once."""
    extradata = stream.codec_context.extradata or b""
    name = stream.codec_context.name
    if name in ("h264", "hevc") and extradata[:1] == b"\x01":
        return BitStreamFilterContext(f"{name}_mp4toannexb", stream)
    if repeat_headers and extradata:
        return BitStreamFilterContext("dump_extra=freq=keyframe", stream)
    return None


def video_packets(container: Any) -> Iterator[tuple[VideoStream, Packet]]:
    """The packets of the first video stream.

    Raises:
        VideoError: `no_video_stream`.
    """
    if not container.streams.video:
        raise VideoError("no_video_stream", "The stream has no video: send one that has.")
    stream = container.streams.video[0]
    for packet in container.demux(stream):
        yield stream, packet
