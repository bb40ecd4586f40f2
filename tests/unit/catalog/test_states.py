from itertools import pairwise

import pytest

from f2l_vllm.catalog.states import IN_WORK, TRANSITIONS, IllegalTransition, VideoState, check_transition


def test_the_ordinary_life_is_allowed():
    life = [VideoState.UPLOADED, VideoState.DECODING, VideoState.ENCODING, VideoState.PUBLISHING]
    life += [VideoState.PROCESSED, VideoState.EXPIRED, VideoState.DELETED]
    for current, new in pairwise(life):
        check_transition(current, new)


def test_the_dead_do_not_come_back():
    assert not TRANSITIONS[VideoState.DELETED]
    for state in VideoState:
        with pytest.raises(IllegalTransition, match="cannot go from deleted"):
            check_transition(VideoState.DELETED, state)


def test_every_state_in_work_can_end_and_can_be_interrupted():
    for state in IN_WORK:
        assert {VideoState.ERROR, VideoState.EXPIRED, VideoState.DELETED} <= TRANSITIONS[state]
        assert state is VideoState.UPLOADED or VideoState.UPLOADED in TRANSITIONS[state]
