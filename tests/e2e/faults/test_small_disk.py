"""A disk of 12 MB, filled by uploads and emptied by deletes, through the routes and by nobody else."""

import json
import struct
import subprocess
import sys

import pytest

from tests.support.disk import MountedDisk
from tests.support.videos import write_video

_PROCESS = """
import asyncio, json, sys
from pathlib import Path
import httpx
from fastapi import FastAPI
from f2l_vllm import torch_shims
torch_shims.install()
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import Store
from f2l_vllm.server import errors
from f2l_vllm.server.videos.routes import router
from f2l_vllm.server.registry import Registry
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.store.address import Revisions
from f2l_vllm.settings import Settings

async def main():
    home = Path(sys.argv[1])
    store, catalog = Store(home), Catalog(f"sqlite:///{home / 'catalog.sqlite3'}")
    registry = Registry({}, None, store, base_model="base", host_slots=8, wanted=catalog.refers_to)
    settings, revisions = Settings(home=home), Revisions("base", "one")
    app = FastAPI()
    app.include_router(router)
    app.add_exception_handler(errors.APIError, errors.answer)
    app.add_exception_handler(Unavailable, errors.answer_unavailable)
    app.state.f2l = service = VideoService(settings, revisions, catalog, store, registry, None, lambda: False)
    print("ready", flush=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        for line in sys.stdin:
            method, path, video = json.loads(line)
            files = {"file": Path(video).read_bytes()} if video else None
            answer = await client.request(method, path, files=files, data={"purpose": "vision"} if files else None)
            await service.tidy()
            print(json.dumps([answer.status_code, answer.json()]), flush=True)

asyncio.run(main())
"""


class SmallDisk(MountedDisk):
    BYTES = 12 << 20


@pytest.fixture
def disk(tmp_path):
    try:
        disk = SmallDisk(tmp_path / "home")
    except PermissionError:
        pytest.skip("file systems may not be mounted here")
    yield disk
    disk.close()


@pytest.fixture
def start(disk, tmp_path):
    """`start()`: a server's routes in a process of its own, on the disk; gives a function that asks it."""
    processes = []

    def begin():
        command = [sys.executable, "-c", _PROCESS, str(disk.folder)]
        with (tmp_path / "log").open("a") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            process = disk.run(lambda: subprocess.Popen(command, **pipes))
        processes.append(process)
        assert process.stdout.readline() == "ready\n"

        def ask(method, path, video=""):
            process.stdin.write(json.dumps([method, path, str(video)]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        return ask

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def padded(clip, path, index, size):
    """Another video of this length that shows the same: an mp4 may hold a box of anything."""
    more = size - clip.stat().st_size
    path.write_bytes(clip.read_bytes() + struct.pack(">I4s", more, b"free") + bytes([index]) * (more - 8))
    return path


def test_a_disk_that_uploads_have_filled_is_emptied_through_the_api(disk, start, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames=8, fps=8, size=(64, 48))
    ask = start()
    ids = []
    for index in range(40):
        status, found = ask("POST", "/v1/files", padded(clip, tmp_path / "video.mp4", index, 700_000))
        if status != 200:
            break
        ids.append(found["id"])
    assert (status, found["error"]["code"]) == (507, "store_unavailable")
    assert len(ids) > 5
    with disk.full([]):  # by somebody else, to the last byte
        for file_id in ids[:3]:
            assert ask("DELETE", f"/v1/files/{file_id}")[0] == 200
    assert ask("DELETE", f"/v1/files/{ids[3]}")[0] == 200
    with disk.full([]):
        again = start()  # after a crash, too
        for file_id in ids[4:]:
            assert again("DELETE", f"/v1/files/{file_id}")[0] == 200
        assert again("GET", "/v1/files")[1]["data"] == []
        assert [path for path in (disk.seen / "videos").rglob("*") if path.is_file()] == []
    assert again("POST", "/v1/files", tmp_path / "video.mp4")[0] == 200
