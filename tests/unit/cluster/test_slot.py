"""Folders of replicas; `tests/e2e/cluster` runs replicas in Ray Serve."""

import os

from filelock import FileLock

from f2l_vllm.cluster.slot import Slot

LOCK = "home/server.lock"


def test_each_replica_has_a_folder_of_its_own_and_the_next_one_finds_its_cache(tmp_path):
    first, second = Slot.take(tmp_path, LOCK), Slot.take(tmp_path, LOCK)
    assert [slot.folder.name for slot in (first, second)] == ["0", "1"]
    first.lock.release()
    with FileLock(first.folder / LOCK):  # its server is still ending
        assert Slot.take(tmp_path, LOCK).folder.name == "2"
    assert Slot.take(tmp_path, LOCK).folder == first.folder


def test_the_folders_of_replicas_that_have_ended_are_left(tmp_path):
    mine, other, ended = (Slot.take(tmp_path) for _ in range(3))
    ended.lock.release()
    left = mine.left()
    assert next(left) == ended.folder
    late = Slot.take(tmp_path)
    assert late.folder.name == "3"  # the other one is being looked at
    assert list(left) == []
    other.lock.release()
    assert list(mine.left()) == [other.folder, ended.folder]


def test_the_newest_files_of_a_folder_are_kept(tmp_path):
    slot = Slot.take(tmp_path)
    for age in range(5):
        log = slot.folder / f"server-{9 - age}.log"
        log.touch()
        os.utime(log, (100 - age, 100 - age))
    slot.drop_old("server-*.log", 2)
    assert {path.name for path in slot.folder.iterdir()} == {"replica.lock", "server-9.log", "server-8.log"}
