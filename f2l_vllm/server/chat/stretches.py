"""Which pieces of a stream a question is answered from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from f2l_vllm.catalog.stream_tables import PieceRecord, StreamRecord
from f2l_vllm.catalog.tables import AdapterRecord
from f2l_vllm.server.chat.request import Span
from f2l_vllm.server.errors import bad_request
from f2l_vllm.server.streams import pyramid
from f2l_vllm.server.streams.live import stream_is_empty

_WALL_CLOCK = 1e8  # seconds: no stream lasts so long, and no wall clock shows less


def stretch(stream: StreamRecord, span: Span | None, head: float) -> tuple[float, float]:
    """What of a stream that has come to `head` is meant, in Unix seconds; without a span, its window."""
    origin = stream.origin or 0.0
    if span is None or span.last is not None:
        seconds = stream.window_seconds if span is None or span.last is None else span.last
        return head - seconds, head

    def moment(second: float) -> float:
        return second if second >= _WALL_CLOCK and math.isfinite(second) else origin + second

    return moment(span.start), moment(span.end)


def pieces_for(
    stream: StreamRecord,
    pieces: Sequence[PieceRecord],
    span: Span | None,
    most: int,
    count: Callable[[AdapterRecord], int],
    *,
    ready_only: bool,
) -> list[PieceRecord]:
    """The pieces that a question about this span is answered from, oldest first.

    Args:
        most: how many chunks the engine has room for.
        count: the chunks of an adapter, one unless the server cuts videos into chunks.
        ready_only: do not wait for pieces in work.

    Raises:
        APIError: `stream_is_empty`; `span_not_available`: nothing of the stream lies in it.
    """
    here = [piece for piece in pieces if piece.file is not None]
    if ready_only:
        here = [piece for piece in here if pyramid.is_ready(piece)]
    if not here:
        raise stream_is_empty(stream)
    start, end = stretch(stream, span, max(piece.end for piece in here))
    chunks = max((count(piece.adapter) for piece in here if piece.adapter is not None), default=1)
    chosen = pyramid.choose(here, start, end, max(1, most // max(1, chunks)))
    if not chosen and span is None:  # the newest piece is longer than the window
        chosen = [min(here, key=lambda piece: (-piece.end, piece.end - piece.start))]
    if not chosen:
        origin = stream.origin or 0.0
        known = ", ".join(f"{piece.start - origin:.0f} to {piece.end - origin:.0f}" for piece in here)
        message = (
            f"The stream '{stream.id}' holds no piece between seconds {start - origin:.0f} and {end - origin:.0f}: "
            f"what is old is read in longer pieces. Ask about a stretch that holds one of these: {known} s."
        )
        raise bad_request("span_not_available", message, "f2l")
    return chosen
