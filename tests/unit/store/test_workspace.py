"""Work in progress of processes that live, are killed, or are on another machine."""

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

from f2l_vllm.store.store import Store
from f2l_vllm.store.workspace import Workspace

_PROCESS = """
import sys, time
from pathlib import Path
from f2l_vllm.store.store import Store

store = Store(Path(sys.argv[1]))
store.temporary().write_bytes(b"half a video")
half = store.temporary()
half.mkdir()
(half / "weights").write_text("half an adapter")
print(half.parent.name, flush=True)
time.sleep(600)
"""


@contextmanager
def at_work(home):
    """A process in the middle of something: itself, and the name of its folder."""
    process = subprocess.Popen([sys.executable, "-c", _PROCESS, str(home)], stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def folders(home):
    return {path.name for path in (home / "tmp").iterdir()}


def test_what_a_killed_process_left_goes_when_the_store_is_opened_and_nothing_of_a_living_one(tmp_path):
    with at_work(tmp_path) as (_, living), at_work(tmp_path) as (killed, dead):
        Store(tmp_path)
        assert folders(tmp_path) == {living, dead}
        killed.kill()
        killed.wait()
        Store(tmp_path)
        assert folders(tmp_path) == {living}
        assert len(list((tmp_path / "tmp" / living).iterdir())) == 2


def test_a_store_that_is_closed_leaves_no_folder_and_works_again(tmp_path):
    store = Store(tmp_path)
    store.temporary().write_bytes(b"x")
    store.close()
    assert folders(tmp_path) == set()
    store.temporary().write_bytes(b"x")
    store.close()
    assert folders(tmp_path) == set()


def test_a_folder_that_somebody_removed_is_made_again(tmp_path):
    workspace = Workspace(tmp_path)
    first = workspace.fresh()
    first.parent.rmdir()
    second = workspace.fresh()
    second.write_bytes(b"x")
    Workspace(tmp_path).clear()
    assert second.exists()
    workspace.close()


def test_what_another_machine_left_goes_when_it_is_old(tmp_path):
    for name in ("elsewhere.0", "of an earlier version"):
        (tmp_path / name).mkdir()
    workspace = Workspace(tmp_path)
    workspace.clear()
    assert len(list(tmp_path.iterdir())) == 2
    workspace.clear(old_s=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_cleared_between_its_making_and_its_lock(tmp_path):
    ended = threading.Event()

    def clear():
        while not ended.is_set():
            Workspace(tmp_path).clear()

    clearing = threading.Thread(target=clear)
    clearing.start()
    deadline = time.monotonic() + 2
    try:
        while time.monotonic() < deadline:
            workspace = Workspace(tmp_path)
            path = workspace.fresh()
            path.write_bytes(b"x")
            assert path.exists()
            workspace.close()
    finally:
        ended.set()
        clearing.join()
    assert os.listdir(tmp_path) == []
