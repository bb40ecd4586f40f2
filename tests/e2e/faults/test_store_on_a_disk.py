"""A store, in a process of its own, on a disk that fills up or becomes read-only."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.disk import LimitedDisk, MountedDisk, open_disk

_PROCESS = """
import hashlib, json, sys
from pathlib import Path
import torch
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.store.errors import Unavailable, disk_errors
from f2l_vllm.store.store import Store
from f2l_vllm.hypernetwork.adapter import save_tensors

home = Path(sys.argv[1])
store, catalog = Store(home), Catalog(f"sqlite:///{home / 'catalog.sqlite3'}")

def keep(text):
    temporary = store.temporary()
    try:
        with disk_errors("keep an upload"):
            temporary.write_bytes(text.encode() * 4096)
        store.keep_video(temporary, hashlib.sha256(text.encode()).hexdigest())
    finally:
        store.discard(temporary)

def publish(name):
    tensors = {f"x.down_proj.lora_{half}.weight": torch.ones(8, 512) for half in "AB"}
    store.publish_adapter(name, lambda directory: save_tensors(tensors, directory, "base"), {})

def enter(name):
    for index in range(200):
        catalog.add_file(Upload("t", name, 1, "x" * 1000, "vision"), name, queue_limit=10)

for line in sys.stdin:
    method, argument = json.loads(line)
    try:
        {"keep": keep, "publish": publish, "enter": enter, "verify": store.verify_adapter}[method](argument)
        print(json.dumps(["done", False]), flush=True)
    except Unavailable as error:
        print(json.dumps([error.code, error.full]), flush=True)
    except Exception as error:
        print(json.dumps([repr(error), False]), flush=True)
"""


class Bench:
    """`do(method, argument)` is done in the process; what it says is `done`, or an error's code and whether it is of
    room."""

    def __init__(self, disk, folder):
        self.disk = disk
        command = [sys.executable, "-c", _PROCESS, str(disk.folder)]
        with (folder / "log").open("w") as log:
            self.process = disk.run(
                lambda: subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder
                )
            )
        assert self.do("keep", "first") == ["done", False]
        assert self.do("publish", "f2l-first") == ["done", False]

    def do(self, method, argument):
        self.process.stdin.write(json.dumps([method, argument]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def whole(self):
        """Names of what is there, every adapter of it sound; nothing is half written."""
        home = self.disk.seen
        assert list((home / "tmp").glob("*/*")) == []
        adapters = sorted(path.name for path in (home / "adapters").iterdir())
        for name in adapters:
            assert self.do("verify", name) == ["done", False]
        return [*adapters, *(path.name for path in (home / "videos").glob("*/*"))]


@pytest.fixture(params=["mounted", "limited"])
def bench(request, tmp_path):
    """On either kind of disk; where nothing may be mounted, twice on the other."""
    disk = LimitedDisk(tmp_path / "home") if request.param == "limited" else open_disk(tmp_path / "home")
    bench = Bench(disk, tmp_path)
    yield bench
    bench.process.stdin.close()
    bench.process.wait()
    disk.close()


@contextmanager
def full(bench):
    with bench.disk.full([bench.process.pid]):
        yield


def test_a_full_disk_is_said_leaves_nothing_half_there_and_passes(bench):
    before = bench.whole()
    with full(bench):
        assert bench.do("publish", "f2l-second") == ["store_unavailable", True]
        assert bench.do("keep", "second") == ["store_unavailable", True]
        code, _ = bench.do("enter", "f2l-second")
        assert code == "store_unavailable"
        assert bench.whole() == before
    for method in ("publish", "keep", "enter"):
        assert bench.do(method, "f2l-second") == ["done", False]
    assert len(bench.whole()) == len(before) + 2


def test_a_read_only_disk_is_said_read_and_passes(bench):
    before = bench.whole()
    with bench.disk.read_only():
        assert bench.do("publish", "f2l-second") == ["store_unavailable", False]
        assert bench.do("keep", "second") == ["store_unavailable", False]
        assert bench.whole() == before
    for method in ("publish", "keep", "enter"):
        assert bench.do(method, "f2l-second") == ["done", False]
    assert len(bench.whole()) == len(before) + 2


def test_both_kinds_are_what_they_say(tmp_path):
    """Where mounts are permitted the mounted one is used, and leaves nothing mounted for others."""
    disk = open_disk(tmp_path / "home")
    assert isinstance(disk, MountedDisk) or list(disk.folder.iterdir()) == []
    disk.run((disk.folder / "file").write_text, "x")
    assert (disk.seen / "file").read_text() == "x"
    if isinstance(disk, MountedDisk):
        assert list(disk.folder.iterdir()) == []
        assert str(disk.folder) not in Path("/proc/mounts").read_text()
    disk.close()
