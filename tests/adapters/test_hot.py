import pytest

from f2l_vllm.adapters.hot import HotSet
from f2l_vllm.adapters.store import Store

WEIGHTS = "adapter_model.safetensors"


def write(text):
    def fill(directory):
        directory.mkdir()
        (directory / WEIGHTS).write_text(text)

    return fill


@pytest.fixture
def store(tmp_path, monkeypatch):
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr("f2l_vllm.adapters.hot.MEMORY", memory)
    monkeypatch.setattr(HotSet.open.__func__, "__defaults__", (memory,))
    return Store(tmp_path / "home", hot_bytes=2800)


def publish(store, *names):
    for name in names:
        store.publish_adapter(name, write(name[-1] * 1000), {})


def is_hot(store, name):
    return store._hot.path(name) is not None


def test_an_adapter_is_loaded_from_memory_the_second_time(store):
    publish(store, "f2l-1")
    path = store.load_path("f2l-1")
    assert path != store.adapter_path("f2l-1")
    assert (path / WEIGHTS).read_text() == "1" * 1000
    assert store.load_path("f2l-1") == path


def test_a_damaged_copy_in_memory_is_made_again(store):
    publish(store, "f2l-1")
    path = store.load_path("f2l-1")
    (path / WEIGHTS).write_text("2" * 1000)
    assert (store.load_path("f2l-1") / WEIGHTS).read_text() == "1" * 1000


def test_the_least_recently_used_goes_but_never_one_in_use_or_pinned(store):
    names = ["f2l-1", "f2l-2", "f2l-3", "f2l-4"]
    publish(store, *names)
    for name in names[:3]:
        store.load_path(name)
    assert [is_hot(store, name) for name in names] == [False, True, True, False]
    store.protect(lambda name: name == "f2l-2")
    store.load_path("f2l-4")
    assert [is_hot(store, name) for name in names] == [False, True, False, True]
    store.pin({"f2l-4"})
    assert store.load_path("f2l-1") == store.adapter_path("f2l-1")  # no room: from disk
    assert [is_hot(store, name) for name in names] == [False, True, False, True]


def test_removal_and_sweep_reach_memory_too_and_a_stop_empties_it(store, tmp_path):
    publish(store, "f2l-1", "f2l-2")
    for name in ("f2l-1", "f2l-2"):
        store.load_path(name)
    store.remove_adapter("f2l-1")
    assert not is_hot(store, "f2l-1")
    store.sweep(keep=lambda _name: False)
    assert not is_hot(store, "f2l-2")
    store.load_path("f2l-2")
    store.close()
    assert list((tmp_path / "memory").iterdir()) == []
    assert (store.load_path("f2l-2") / WEIGHTS).read_text() == "2" * 1000


def test_without_a_memory_file_system_everything_works_from_disk(tmp_path):
    assert HotSet.open(tmp_path, 1000, memory=tmp_path / "none") is None
    assert HotSet.open(tmp_path, 0) is None
