"""Where on the wall clock a segment of a stream lies, by its own timestamps and what is known of the stream.

Timestamps are trusted for the order of segments and the gaps between them, but not for a jump into the future. A sender
that starts again, jumps or has no timestamps at all goes on where the stream has come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from f2l_vllm.catalog.stream_tables import Span

_WRAP_SECONDS = 2**33 / 90000  # after which MPEG-TS begins again at 0
_SLACK_SECONDS = 5.0  # that a sender's clock may run ahead of ours
_AHEAD_SEGMENTS = 6  # that may be on their way at once: a film may be sent faster than it is shown, and out of order
_JITTER_SECONDS = 0.25
_EARLIEST_SEGMENTS = 3  # that may come behind the first one and lie before it


@dataclass(frozen=True)
class Place:
    """Unix seconds, and the offset of the stream's timestamps from there on."""

    start: float
    end: float
    offset: float


def place(
    begins: float,
    seconds: float,
    now: float,
    *,
    offset: float | None,
    origin: float | None,
    head: float | None,
    known: Sequence[Span],
) -> Place:
    """The place of a segment.

    Args:
        begins: its first timestamp, seconds.
        seconds: how long it lasts.
        now: when it arrived, Unix seconds.
        offset, origin, head: of the stream; None: it is the first segment.
        known: the stretches that the stream has already.
    """
    if offset is None or origin is None or head is None:
        start = now - seconds
        return Place(start, now, start - begins)
    start = begins + offset
    start += _WRAP_SECONDS * round((head - start) / _WRAP_SECONDS)
    jumps = start > head + _JITTER_SECONDS + _AHEAD_SEGMENTS * seconds and start + seconds > now + _SLACK_SECONDS
    if jumps or start < origin - (_EARLIEST_SEGMENTS + 0.5) * seconds or overlaps(start, start + seconds, known):
        start = max(head, now - seconds)
    return Place(start, start + seconds, start - begins)


def overlaps(start: float, end: float, known: Sequence[Span]) -> bool:
    """Whether more than half of a stretch is known."""
    return sum(max(0.0, min(end, other[1]) - max(start, other[0])) for other in known) > (end - start) / 2
