"""Where segments lie, by their own timestamps."""

import pytest

from f2l_vllm.catalog.placing import place

NOW = 1_000_000.0
WRAP = 2**33 / 90000


def put(begins, seconds=10.0, now=NOW, known=((NOW - 10, NOW),), offset=None, head=None):
    """A segment of a stream whose first segment began at timestamp 100 and arrived at NOW."""
    offset = NOW - 110 if offset is None else offset
    known = list(known)
    return place(begins, seconds, now, offset=offset, origin=NOW - 10, head=head or known[-1][1], known=known)


def test_the_first_one_ends_when_it_arrives():
    found = place(100.0, 10.0, NOW, offset=None, origin=None, head=None, known=[])
    assert (found.start, found.end, found.offset) == (NOW - 10, NOW, NOW - 110)


@pytest.mark.parametrize("begins", [110.0, 120.0, 160.0])
def test_timestamps_say_what_follows_and_how_large_a_gap_is(begins):
    assert put(begins, now=NOW + begins - 100).start == NOW - 110 + begins


def test_one_that_comes_late_goes_between_the_others():
    known = [(NOW - 10, NOW), (NOW + 10, NOW + 20)]
    assert put(110.0, known=known, now=NOW + 21).start == NOW


def test_a_clock_that_jumps_ahead_does_not_make_time_pass():
    found = put(100_000.0, now=NOW + 10)
    assert (found.start, found.end) == (NOW, NOW + 10)
    assert found.offset == NOW - 100_000


@pytest.mark.parametrize("begins", [0.0, 100.0, 103.0, -5000.0])
def test_a_sender_that_starts_again_goes_on_where_the_stream_is(begins):
    assert put(begins, now=NOW + 10).start == NOW


def test_after_a_pause_a_sender_that_starts_again_goes_on_when_it_does():
    assert put(100.0, now=NOW + 500).end == NOW + 500


def test_the_33_bits_of_mpeg_ts_begin_again_after_26_hours():
    offset = NOW - 10 - (WRAP - 10)
    assert put(0.0, offset=offset, now=NOW + 10).start == pytest.approx(NOW)
    assert put(10.0, offset=offset, now=NOW + 20).start == pytest.approx(NOW + 10)


def test_a_film_may_be_sent_faster_than_it_is_shown():
    assert put(150.0, now=NOW).start == NOW + 40
