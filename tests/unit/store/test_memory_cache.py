import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from f2l_vllm.store.manifest import Manifests, StoreError
from f2l_vllm.store.memory_cache import HotSet
from f2l_vllm.store.store import Store
from tests.unit.store.test_store import write

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(tmp_path, monkeypatch):
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr("f2l_vllm.store.memory_cache.MEMORY", memory)
    monkeypatch.setattr(HotSet.open.__func__, "__defaults__", (memory,))
    return Store(tmp_path / "home", hot_bytes=2800)


def load(store, name):
    """Load, and let what is copied behind it arrive."""
    path = store.load_path(name)
    store._hot._copier.submit(int).result()
    return path


def until_older(path):
    """Files as old as the clock's tick may change and show the same times, so they are not taken for unchanged."""
    newest = max(file.stat().st_ctime for file in path.iterdir())
    time.sleep(max(0.0, newest + 0.03 - time.time()))


def publish(store, *names):
    for name in names:
        store.publish_adapter(name, write(name[-1] * 1000), {})


def is_hot(store, name):
    return store._hot.path(name) is not None


def test_an_adapter_is_loaded_from_memory_the_second_time(store):
    publish(store, "f2l-1")
    assert load(store, "f2l-1") == store.adapter_path("f2l-1")  # nobody waits for the copy
    path = load(store, "f2l-1")
    assert path != store.adapter_path("f2l-1")
    assert (path / WEIGHTS).read_text() == "1" * 1000


def test_what_is_copied_is_compared_and_damage_is_not_kept(store):
    publish(store, "f2l-1")
    (store.adapter_path("f2l-1") / WEIGHTS).write_text("2" * 1000)
    with pytest.raises(StoreError, match="differs"):
        store.prepare("f2l-1")
    assert store.load_path_at_once("f2l-1") is None
    assert store._hot.names() == []


def test_a_copy_that_was_checked_needs_no_reading_until_it_changes(store, monkeypatch):
    publish(store, "f2l-1")
    read = []
    monkeypatch.setattr("f2l_vllm.store.manifest.sha256_of", read.append)
    assert store.prepare("f2l-1")
    path = store.load_path_at_once("f2l-1")
    assert path == store.load_path("f2l-1") != store.adapter_path("f2l-1")
    assert read == []  # compared as it was copied
    monkeypatch.undo()
    (path / WEIGHTS).write_text("2" * 1000)
    assert store.load_path_at_once("f2l-1") is None
    assert (load(store, "f2l-1") / WEIGHTS).read_text() == "1" * 1000


@pytest.mark.parametrize("damage", ["same length", "cut short", "away", "one file more", "replaced"])
def test_a_damaged_copy_in_memory_is_made_again(store, damage):
    publish(store, "f2l-1")
    load(store, "f2l-1")
    until_older(path := store.load_path("f2l-1"))
    store.load_path("f2l-1")
    weights = path / WEIGHTS
    if damage == "same length":
        weights.write_text("2" * 1000)
    elif damage == "cut short":
        weights.write_text("1" * 999)
    elif damage == "away":
        weights.unlink()
    elif damage == "one file more":
        (path / "other").write_text("2")
    else:
        (path / "new").write_text("2" * 1000)
        (path / "new").rename(weights)
    assert store.load_path_at_once("f2l-1") is None
    assert (load(store, "f2l-1") / WEIGHTS).read_text() == "1" * 1000
    assert (load(store, "f2l-1") / WEIGHTS).read_text() == "1" * 1000


def test_a_copy_that_another_process_took_away_is_made_again(store):
    publish(store, "f2l-1")
    load(store, "f2l-1")
    until_older(path := store.load_path("f2l-1"))
    store.load_path("f2l-1")
    shutil.rmtree(path)
    assert store.load_path_at_once("f2l-1") is None
    assert load(store, "f2l-1") == store.adapter_path("f2l-1")
    assert load(store, "f2l-1") == path


def test_the_least_recently_used_goes_but_never_one_in_use_or_pinned(store):
    names = ["f2l-1", "f2l-2", "f2l-3", "f2l-4"]
    publish(store, *names)
    for name in names[:3]:
        load(store, name)
    assert [is_hot(store, name) for name in names] == [False, True, True, False]
    store.protect(lambda name: name == "f2l-2")
    load(store, "f2l-4")
    assert [is_hot(store, name) for name in names] == [False, True, False, True]
    store.pin({"f2l-4"})
    for _ in range(2):
        assert load(store, "f2l-1") == store.adapter_path("f2l-1")  # no room: from disk
    assert [is_hot(store, name) for name in names] == [False, True, False, True]


def test_what_is_published_is_copied_ahead_while_there_is_room(store):
    names = ["f2l-1", "f2l-2", "f2l-3"]
    publish(store, *names)
    assert [store.prepare(name) for name in names] == [True, True, False]
    assert [is_hot(store, name) for name in names] == [True, True, False]  # nothing had to go for it
    assert store.load_path("f2l-1") != store.adapter_path("f2l-1")


def test_removal_and_sweep_reach_memory_too_and_a_stop_empties_it(store, tmp_path):
    publish(store, "f2l-1", "f2l-2")
    for name in ("f2l-1", "f2l-2"):
        load(store, name)
    store.remove_adapter("f2l-1")
    assert not is_hot(store, "f2l-1")
    store.sweep(lambda _names: ())
    assert not is_hot(store, "f2l-2")
    load(store, "f2l-2")
    store.close()
    assert list((tmp_path / "memory").iterdir()) == []
    assert (store.load_path("f2l-2") / WEIGHTS).read_text() == "2" * 1000


def test_what_a_crash_left_is_used_again_after_a_check(store, tmp_path):
    publish(store, "f2l-1", "f2l-2")
    for name in ("f2l-1", "f2l-2"):
        load(store, name)
    (store._hot.path("f2l-2") / WEIGHTS).write_text("1" * 1000)
    again = Store(tmp_path / "home", hot_bytes=2800)
    assert again.load_path_at_once("f2l-1") is None
    assert again.load_path("f2l-1") == store._hot.path("f2l-1")
    assert again.load_path("f2l-2") == again.adapter_path("f2l-2")


def test_an_adapter_removed_while_it_is_copied_leaves_no_copy(store, tmp_path):
    for number in range(30):
        name = f"f2l-{number}"
        publish(store, name)
        store.load_path(name)
        store.remove_adapter(name)
    store._hot._copier.submit(int).result()
    assert [path for folder in (tmp_path / "memory").iterdir() for path in folder.iterdir()] == []
    assert not store._manifests._sound


def test_an_adapter_that_two_threads_copy_is_copied_once(store, caplog):
    publish(store, "f2l-1")
    source = store.adapter_path("f2l-1")
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: store._hot.put("f2l-1", source), range(4)))
    assert made == [store._hot.path("f2l-1")] * 4
    assert caplog.records == []


def test_without_a_memory_file_system_everything_works_from_disk(tmp_path):
    assert HotSet.open(tmp_path, 1000, Manifests(), memory=tmp_path / "none") is None
    assert HotSet.open(tmp_path, 0, Manifests()) is None
