"""Which pieces a stream is made of, and which answer about a stretch."""

import random
from dataclasses import replace

import pytest

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.stream_tables import PieceRecord, StreamRecord, StreamState
from f2l_vllm.catalog.streams import joined, slot
from f2l_vllm.catalog.tables import AdapterRecord, FileRecord
from f2l_vllm.server.streams import pyramid
from f2l_vllm.store.adapter_info import AdapterInfo

ORIGIN, SECONDS = 1_000_000.0, 10.0
STREAM = StreamRecord(
    1, "stream-1", "t", "", StreamState.LIVE, ORIGIN, None, SECONDS, 60.0, None, 600.0, None, True, None, {}, 0.0,
    ORIGIN, ORIGIN, ORIGIN, 0, None, None,
)  # fmt: skip


def piece(start, end, level=0, state=VideoState.PROCESSED, spans=None):
    start, end = ORIGIN + start, ORIGIN + end
    name = f"file-{level}-{start}"
    file = FileRecord(1, name, "stream-1", "", "vision", 1, "", name, state, 1.0, None, None, ORIGIN, None)
    made = AdapterRecord(1, name, 16, 1, AdapterInfo(), ORIGIN) if state is VideoState.PROCESSED else None
    place = slot(start, end, ORIGIN, SECONDS * 2**level)
    spans = spans or ((start, end),)
    return PieceRecord(1, "stream-1", level, place, start, end, spans, "", "", name, ORIGIN, file, made)


def merged(node, state=VideoState.PROCESSED):
    spans = joined([span for part in node.parts for span in part.spans])
    start, end = spans[0][0] - ORIGIN, spans[-1][1] - ORIGIN
    return replace(piece(start, end, node.level, state, tuple(spans)), slot=node.slot)


def tended(stream, pieces):
    """As the server does: make, promote and drop until nothing is left to do."""
    for _ in range(20):
        if not (found := pyramid.to_make(stream, pieces)):
            return pieces
        for node in found:
            if len(node.parts) == 1:
                pieces.remove(node.parts[0])
                pieces.append(replace(node.parts[0], level=node.level, slot=node.slot))
            else:
                pieces.append(merged(node))
        for dropped in pyramid.to_drop(stream, pieces, ORIGIN):
            pieces.remove(dropped)
    raise AssertionError("it never ends")


def grown(segments, gaps=(), jitter=0.0):
    rng, pieces, at, stream = random.Random(7), [], 0.0, STREAM
    for number in range(segments):
        seconds = SECONDS + rng.uniform(-jitter, jitter)
        at += seconds if number in gaps else 0.0
        pieces.append(piece(at, at + seconds))
        at += seconds
        stream = replace(stream, head=ORIGIN + at)
        pieces = tended(stream, pieces)
    return stream, pieces


def at(found):
    return [(round(one.start - ORIGIN), round(one.end - ORIGIN)) for one in found]


@pytest.mark.parametrize("jitter", [0.0, 3.0])
def test_two_hours_are_few_pieces_that_hold_all_of_it(jitter):
    stream, pieces = grown(700, jitter=jitter)
    assert len(pieces) <= 48
    whole = pyramid.covered(pyramid.choose(pieces, ORIGIN, stream.head, 60))
    assert sum(end - start for start, end in whole) >= 0.99 * (stream.head - ORIGIN)


@pytest.mark.parametrize("segments", [7, 13, 50, 361])
def test_the_last_minute_is_few_pieces_and_nothing_else(segments):
    stream, pieces = grown(segments)
    found = pyramid.choose(pieces, stream.head - 60, stream.head, 9)
    assert len(found) <= 4
    assert pyramid.covered(found) == [(stream.head - 60, stream.head)]


def test_what_is_chosen_lies_in_the_stretch_and_is_there_once():
    _, pieces = grown(200, gaps=(3, 50, 120), jitter=2.0)
    rng = random.Random(1)
    for _ in range(500):
        start = ORIGIN + rng.uniform(0, 1800)
        end = start + rng.uniform(25, 600)
        found = pyramid.choose(pieces, start, end, rng.randint(1, 8))
        inside = all(start - 0.3 <= one.start and one.end <= end + 0.3 for one in found)
        assert inside or (len(found) == 1 and found[0].level == 0)
        total = sum(b - a for one in found for a, b in one.spans)
        assert total == pytest.approx(sum(b - a for a, b in joined([s for one in found for s in one.spans])), abs=0.6)


def test_a_stretch_within_a_segment_is_answered_from_that_segment():
    _, pieces = grown(5)
    assert at(pyramid.choose(pieces, ORIGIN + 32, ORIGIN + 37, 4)) == [(30, 40)]


def test_where_there_is_room_for_few_the_newest_and_the_longest_answer():
    stream, pieces = grown(39)
    assert at(pyramid.choose(pieces, ORIGIN, stream.head, 9)) == [(0, 320), (320, 360), (360, 380), (380, 390)]
    assert at(pyramid.choose(pieces, ORIGIN, stream.head, 2)) == [(0, 320), (380, 390)]


def test_a_piece_in_work_is_waited_for_only_where_nothing_is_ready():
    fine = [piece(0, 10), piece(10, 20), piece(20, 30, state=VideoState.ENCODING)]
    coarse = piece(0, 20, level=1, state=VideoState.UPLOADED)
    assert at(pyramid.choose([*fine, coarse], ORIGIN, ORIGIN + 30, 9)) == [(0, 10), (10, 20), (20, 30)]


def test_late_segments_have_their_time_before_a_coarser_piece_is_made():
    first, third = piece(0, 10), piece(20, 30)
    assert pyramid.to_make(replace(STREAM, head=ORIGIN + 20), [first]) == []
    pieces = [first, piece(10, 20), third]
    (node,) = pyramid.to_make(replace(STREAM, head=ORIGIN + 30), pieces)
    assert at(node.parts) == [(0, 10), (10, 20)]


def test_one_that_comes_too_late_is_asked_about_by_itself():
    coarse = piece(0, 40, level=2, spans=((ORIGIN, ORIGIN + 10), (ORIGIN + 20, ORIGIN + 40)))
    late = piece(10, 20)
    assert at(pyramid.choose([coarse, late], ORIGIN, ORIGIN + 40, 9)) == [(0, 40), (10, 20)]
    assert pyramid.to_drop(STREAM, [coarse, late], ORIGIN) == []


def test_a_pool_that_falls_behind_reads_more_coarsely_and_loses_nothing():
    waiting = [piece(10 * i, 10 * i + 10, state=VideoState.UPLOADED) for i in range(8)]
    stream = replace(STREAM, head=ORIGIN + 80)
    assert pyramid.is_behind(waiting)
    nodes = pyramid.to_make(stream, waiting)
    assert [at(node.parts) for node in nodes] == [[(i, i + 10), (i + 10, i + 20)] for i in (0, 20, 40)]
    pieces = waiting + [merged(node, VideoState.UPLOADED) for node in nodes]
    dropped = pyramid.to_drop(stream, pieces, ORIGIN)
    assert sorted(dropped, key=lambda one: one.start) == waiting[:6]
    left = [one for one in pieces if one not in dropped]
    assert pyramid.covered(left) == [(ORIGIN, ORIGIN + 80)]


def test_one_that_keeps_up_waits_for_nothing_coarser():
    assert not pyramid.is_behind([piece(10 * i, 10 * i + 10, state=VideoState.UPLOADED) for i in range(4)])


def test_what_is_older_than_the_stream_keeps_is_dropped():
    stream = replace(STREAM, head=ORIGIN + 100, keep_seconds=30.0)
    pieces = [piece(10 * i, 10 * i + 10) for i in range(10)]
    assert at(pyramid.to_drop(stream, pieces, ORIGIN)) == [(10 * i, 10 * i + 10) for i in range(5, -1, -1)]


def test_a_segment_whose_bytes_never_came_is_forgotten():
    lost = replace(piece(0, 10), file=None, adapter=None)
    assert pyramid.to_drop(STREAM, [lost], ORIGIN + 30) == []
    assert pyramid.to_drop(STREAM, [lost], ORIGIN + 90) == [lost]


def test_standing_questions_go_on_in_order_and_miss_nothing():
    coarse = piece(0, 40, level=2, state=VideoState.UPLOADED)
    fine = [piece(10, 20), piece(20, 30), piece(30, 40)]
    assert pyramid.following([coarse, *fine], ORIGIN) == []  # nothing else has the first ten seconds
    coarse = piece(0, 40, level=2)
    assert at(pyramid.following([coarse, *fine], ORIGIN))[0] == (0, 40)
    assert at(pyramid.following(fine, ORIGIN + 20)) == [(20, 30), (30, 40)]
    failed = piece(40, 50, state=VideoState.ERROR)
    assert at(pyramid.following([*fine, failed], ORIGIN + 30)) == [(30, 40), (40, 50)]
    waiting = piece(50, 60, state=VideoState.UPLOADED)
    assert at(pyramid.following([failed, waiting, piece(60, 70)], ORIGIN + 30)) == [(40, 50)]
