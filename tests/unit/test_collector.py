"""While libraries are imported nothing is collected, and afterwards garbage is again."""

import gc
import weakref

import pytest

from f2l_vllm import collector


class Loop:
    """Garbage that only the collector finds."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def collections():
    """The generations collected while the test runs."""
    seen = []

    def note(phase, info):
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)
    gc.unfreeze()


def test_nothing_is_collected_inside_and_garbage_is_afterwards(collections):
    with collector.paused():
        collections.clear()
        kept = [[] for _ in range(100_000)]
        assert not collections
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(kept)  # later collections leave them out
    garbage = weakref.ref(Loop())
    while garbage() is not None and len(kept) < 10_000_000:
        kept.append([])
    assert garbage() is None


def test_a_failed_import_does_not_leave_it_off():
    def fail():
        with collector.paused():
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_who_turned_collection_off_keeps_it_off():
    gc.disable()
    try:
        with collector.paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
