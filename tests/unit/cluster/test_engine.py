"""Folders of engines; `tests/e2e/cluster/test_serve.py` runs engines in Ray Serve."""

from filelock import FileLock

from f2l_vllm.cluster.engine import Slot
from f2l_vllm.settings import SERVER_LOCK


def test_each_replica_has_a_folder_of_its_own_and_the_next_one_finds_its_cache(tmp_path):
    first, second = Slot.take(tmp_path), Slot.take(tmp_path)
    assert [slot.folder.name for slot in (first, second)] == ["0", "1"]
    first.lock.release()
    with FileLock(first.folder / "home" / SERVER_LOCK):  # its server is still ending
        assert Slot.take(tmp_path).folder.name == "2"
    assert Slot.take(tmp_path).folder == first.folder
