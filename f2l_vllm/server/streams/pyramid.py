"""Which pieces a stream is made of: fine ones of what is new, ever coarser ones of what is old. Pure decisions.

At level n, slots are 2**n segments long. Two neighbours of a level are read again as one piece of the next, so that
any stretch is covered by few pieces, and a stream of n segments needs only about log2(n) levels of a few pieces each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from f2l_vllm.catalog.placing import overlaps
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.stream_tables import PieceRecord, Span, StreamRecord
from f2l_vllm.catalog.streams import joined

_KEPT = (12, 8, 6)  # pieces of each level that stay beside the coarser ones that hold the same; the last: of all others
_KEPT_ABOVE = 3
_BACKLOG = 4  # segments that may wait for a worker before the stream is read more coarsely
_COARSE_BACKLOG = 8  # coarser pieces that may wait before they are read as soon as segments, and fewer are made
_MOST_SEGMENTS = 20  # beyond them, segments are read again in leaps of several levels
_LEAP = 3
_FRESH = 2  # newest segments that are read singly even then
_NOTHING_SECONDS = 0.5  # less than this is no stretch of a stream
_EDGE_SECONDS = 0.25  # segments end on frames, so they do not end where they were meant to
LONGEST_SECONDS = 128 * 86400.0  # of a piece; an mp4 of so few frames holds not much more
_ARRIVAL_SECONDS = 60.0  # between the placing of a segment and the keeping of its bytes


@dataclass(frozen=True)
class Node:
    """A coarser piece that can be made of finer ones."""

    level: int
    slot: int
    parts: tuple[PieceRecord, ...]


def is_ready(piece: PieceRecord) -> bool:
    """Whether it can be asked about."""
    return piece.adapter is not None


def is_in_work(piece: PieceRecord) -> bool:
    """Whether it is going to be ready, unless its video fails."""
    return piece.adapter is None and (piece.file is None or piece.file.state is not VideoState.ERROR)


def is_waiting(piece: PieceRecord) -> bool:
    """Whether no worker has begun with it."""
    return piece.file is not None and piece.file.state is VideoState.UPLOADED


def is_behind(pieces: Sequence[PieceRecord]) -> bool:
    """Whether segments arrive faster than they, or the coarser pieces of them, are read."""
    segments = [piece for piece in pieces if piece.level == 0]
    coarse = sum(is_waiting(piece) and piece.level > 0 for piece in pieces)
    return sum(map(is_waiting, segments)) > _BACKLOG or coarse > _COARSE_BACKLOG or _is_crowded(pieces)


def _is_crowded(pieces: Sequence[PieceRecord]) -> bool:
    """Whether coarser pieces are made, or read, too slowly to stand for what is old."""
    return sum(piece.level == 0 for piece in pieces) > _MOST_SEGMENTS


def _fresh(pieces: Sequence[PieceRecord]) -> set[str]:
    """The newest segments, by their files: they are read singly even when the stream is behind."""
    segments = sorted((piece for piece in pieces if piece.level == 0), key=lambda piece: piece.end)
    return {piece.file_id for piece in segments[-_FRESH:]}


def to_make(stream: StreamRecord, pieces: Sequence[PieceRecord], longest: float = LONGEST_SECONDS) -> list[Node]:
    """The coarser pieces whose time is over and whose parts are here, finest first. One segment's time is left for
    segments that come late, unless the stream has ended or is behind. Where there are too many segments, eight of them
    become one piece at once."""
    if stream.origin is None or stream.head is None:
        return []
    fresh = _fresh(pieces)
    behind = is_behind(pieces)
    there = {(piece.level, piece.slot) for piece in pieces}
    groups: dict[tuple[int, int], list[PieceRecord]] = defaultdict(list)
    lowest = _LEAP if _is_crowded(pieces) else 1
    for piece in pieces:
        level = max(piece.level + 1, lowest)
        groups[level, piece.slot >> (level - piece.level)].append(piece)
    found = []
    for (level, slot), inside in sorted(groups.items(), key=lambda group: group[0]):
        parts = [part for part in inside if not any(one.level > part.level and _holds(one, part) for one in inside)]
        seconds = stream.segment_seconds * 2**level
        instead = behind and all(is_waiting(part) and part.file_id not in fresh for part in parts)
        grace = 0.0 if instead or stream.ended_at is not None else stream.segment_seconds
        over = stream.origin + (slot + 1) * seconds + grace <= stream.head + _EDGE_SECONDS
        if not over or seconds > longest + _EDGE_SECONDS or (level, slot) in there:
            continue
        if any(_is_to_be_read_first(piece, level, slot, pieces) for piece in pieces if level > lowest):
            continue
        sound = [part for part in parts if part.file is not None and (is_ready(part) or is_in_work(part))]
        if sound and not any(other.level >= level and _hold(other, sound) for other in pieces):
            found.append(Node(level, slot, tuple(sorted(sound, key=lambda part: part.start))))
    return found


def to_drop(stream: StreamRecord, pieces: Sequence[PieceRecord], now: float) -> list[PieceRecord]:
    """The pieces that are not needed any more: a coarser one that is ready holds the same, or, when the stream is
    behind and nothing of what that one holds is begun, will. And those that are older than the stream keeps them, and
    those whose bytes never came."""
    behind, fresh = is_behind(pieces), _fresh(pieces)
    by_level: dict[int, list[PieceRecord]] = defaultdict(list)
    for piece in pieces:
        by_level[piece.level].append(piece)
    dropped = []
    for level, found in by_level.items():
        found.sort(key=lambda piece: piece.end, reverse=True)
        kept = _KEPT[level] if level < len(_KEPT) else _KEPT_ABOVE
        for place, piece in enumerate(found):
            above = [other for other in pieces if other.level > level and _holds(other, piece)]
            instead = any(is_ready(other) for other in above)
            too_old = stream.keep_seconds is not None and piece.end < (stream.head or 0.0) - stream.keep_seconds
            may_be_skipped = behind and is_waiting(piece) and piece.file_id not in fresh
            is_skipped = may_be_skipped and any(_stands_for(other, piece, pieces) for other in above)
            failed = not is_ready(piece) and not is_in_work(piece)
            too_old |= piece.file is None and piece.received_at < now - _ARRIVAL_SECONDS
            if too_old or is_skipped or (place >= kept and (instead or failed)):
                dropped.append(piece)
    return dropped


def to_hurry(pieces: Sequence[PieceRecord]) -> list[str]:
    """The adapters of coarser pieces that are no work for idle times: when the stream is behind, they may stand for
    segments."""
    waiting = [piece.file for piece in pieces if piece.level > 0 and is_waiting(piece)] if is_behind(pieces) else []
    return [file.adapter_name for file in waiting if file is not None]


def choose(pieces: Sequence[PieceRecord], start: float, end: float, most: int) -> list[PieceRecord]:
    """The pieces that answer about a stretch, oldest first: as few and long ones as cover all that is there of it, and
    none that holds anything else. Those in work are chosen only where nothing is ready.

    A stretch that no piece lies in is answered from the segment around it.

    Args:
        start, end: Unix seconds.
        most: how many at most. The newest is among them, with those that cover most.
    """
    inside = [piece for piece in pieces if piece.start >= start - _EDGE_SECONDS and piece.end <= end + _EDGE_SECONDS]
    chosen = _disjoint([], sorted(filter(is_ready, inside), key=_length, reverse=True))
    chosen = _disjoint(chosen, sorted(filter(is_in_work, inside), key=_length))
    if not chosen:
        around = [piece for piece in pieces if piece.level == 0 and piece.start < end and piece.end > start]
        around = [piece for piece in around if is_ready(piece) or is_in_work(piece)]
        chosen = sorted(around, key=lambda piece: min(end, piece.end) - max(start, piece.start))[-1:]
    if len(chosen) > most:
        newest = max(chosen, key=lambda piece: piece.end)
        others = sorted((piece for piece in chosen if piece is not newest), key=_length, reverse=True)
        chosen = [newest, *others[: most - 1]]
    return sorted(chosen, key=lambda piece: piece.start)


def _disjoint(chosen: Sequence[PieceRecord], more: Iterable[PieceRecord]) -> list[PieceRecord]:
    """Those chosen, and of the others each that holds little of what is chosen already."""
    found = list(chosen)
    for piece in more:
        known = [span for other in found for span in other.spans]
        if not any(overlaps(start, end, known) for start, end in piece.spans):
            found.append(piece)
    return found


def _is_to_be_read_first(piece: PieceRecord, level: int, slot: int, pieces: Sequence[PieceRecord]) -> bool:
    """Whether a much finer piece lies in this slot that no coarser piece holds yet."""
    lies_in_it = piece.level < level - 1 and piece.slot >> (level - piece.level) == slot
    return lies_in_it and not any(other.level > piece.level and _holds(other, piece) for other in pieces)


def _adding(chosen: Sequence[PieceRecord], more: Iterable[PieceRecord]) -> list[PieceRecord]:
    """Those chosen, and of the others each that holds anything that is not chosen already."""
    found = list(chosen)
    for piece in more:
        known = joined([span for other in found for span in other.spans])
        held = sum(max(0.0, min(end, b) - max(start, a)) for start, end in piece.spans for a, b in known)
        if _length(piece) - held > _NOTHING_SECONDS:
            found.append(piece)
    return found


def _stands_for(coarse: PieceRecord, fine: PieceRecord, pieces: Sequence[PieceRecord]) -> bool:
    """Whether a coarse piece makes this one that it holds needless: nothing of what it holds is begun, or still finer
    pieces have what is in this one. Otherwise, who follows the stream has had a part of it, and needs the rest alone.
    """
    finer = [piece for piece in pieces if piece.level < coarse.level and _holds(coarse, piece)]
    known = joined([span for piece in finer if is_ready(piece) and piece.level < fine.level for span in piece.spans])
    is_known = all(overlaps(start, end, known) for start, end in fine.spans)
    return (is_in_work(coarse) or is_ready(coarse)) and (is_known or all(map(is_waiting, finer)))


def _hold(coarse: PieceRecord, parts: Sequence[PieceRecord]) -> bool:
    return all(_holds(coarse, part) for part in parts)


def _holds(coarse: PieceRecord, fine: PieceRecord) -> bool:
    return all(overlaps(start, end, coarse.spans) for start, end in fine.spans)


def _length(piece: PieceRecord) -> float:
    return sum(end - start for start, end in piece.spans)


def covered(pieces: Iterable[PieceRecord]) -> list[Span]:
    """What is known by these pieces, Unix seconds; stretches that touch are one."""
    return joined([span for piece in pieces for span in piece.spans])


def finest(pieces: Sequence[PieceRecord]) -> list[PieceRecord]:
    """The finest pieces that are ready and hold together all that is known, oldest first."""
    found = _adding([], sorted(filter(is_ready, pieces), key=_length))
    return sorted(found, key=lambda piece: piece.start)


def following(pieces: Sequence[PieceRecord], after: float) -> list[PieceRecord]:
    """The pieces that say what came behind this moment, one behind the other, as fine as they are, up to the first
    that is still in work: ready ones, and those that failed."""
    found: list[PieceRecord] = []
    while (piece := _next(pieces, after)) is not None and not is_in_work(piece):
        found.append(piece)
        after = piece.end
    return found


def _next(pieces: Sequence[PieceRecord], after: float) -> PieceRecord | None:
    """The finest piece that has what comes first behind this moment, and nothing before it if there is such a one."""
    behind = [(start, piece) for piece in pieces for start, end in piece.spans if end > after + _EDGE_SECONDS]
    first = min((max(start, after) for start, _ in behind), default=0.0)
    there = [piece for start, piece in behind if start <= first + _EDGE_SECONDS]
    return min(there, key=lambda piece: (piece.start < after - _EDGE_SECONDS, _length(piece)), default=None)
