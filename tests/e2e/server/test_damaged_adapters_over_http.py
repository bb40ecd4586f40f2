"""Adapter files that are damaged or missing, on disk and in memory: answers stay the video's own, or are made again."""

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import httpx
import pytest

from f2l_vllm.store import manifest
from tests.support.videos import write_video

QUESTION = [{"role": "user", "content": "What is shown?"}]
WEIGHTS = "adapter_model.safetensors"


def flip(directory):
    weights = directory / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))


DAMAGE = {
    "a flipped bit": flip,
    "cut short": lambda directory: os.truncate(directory / WEIGHTS, 500),
    "empty": lambda directory: (directory / WEIGHTS).write_bytes(b""),
    "no weights": lambda directory: (directory / WEIGHTS).unlink(),
    "no configuration": lambda directory: (directory / "adapter_config.json").unlink(),
    "no manifest": lambda directory: (directory / manifest.MANIFEST_FILE).unlink(),
    "nothing": shutil.rmtree,
}


def ask(server, file_id):
    options = {"temperature": 0, "max_tokens": 12}
    response = server.client.chat.completions.create(model=file_id, messages=QUESTION, **options)
    return response.choices[0].message.content


def copies(server, file):
    """Where the adapter lies: on disk, and in memory if it is there."""
    name = file.model_extra["f2l"]["adapter"]
    memory = f"f2l-{os.getuid()}-{hashlib.sha256(str(server.home).encode()).hexdigest()[:12]}"
    return [
        path for folder in (server.home / "adapters", Path("/dev/shm") / memory) for path in folder.glob(f"{name}*")
    ]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video that no other test uploads: its adapter lives as long as the file here."""
    return write_video(tmp_path_factory.mktemp("damaged") / "own.mp4", frames=31, size=(176, 144))


@pytest.fixture(scope="module")
def sound(server, clip):
    """What the video answers, and its adapter, before anything happens to it."""
    file = server.upload(clip)
    answer, base = ask(server, file.id), ask(server, "base")
    assert answer != base
    weights = (copies(server, file)[0] / WEIGHTS).read_bytes()
    server.client.files.delete(file.id)
    return answer, weights


@pytest.fixture
def file(server, clip, sound):
    file = server.upload(clip)
    yield file
    server.client.files.delete(file.id)
    assert copies(server, file) == []


@pytest.mark.parametrize("kind", DAMAGE)
def test_before_the_first_question(server, file, sound, kind):
    for copy in copies(server, file):
        DAMAGE[kind](copy)
    assert ask(server, file.id) == sound[0]
    for copy in copies(server, file):
        manifest.verify(copy, copy.name)
        assert (copy / WEIGHTS).read_bytes() == sound[1]


@pytest.mark.parametrize("kind", DAMAGE)
def test_while_it_is_in_the_engine(server, file, sound, kind):
    assert ask(server, file.id) == sound[0]
    for copy in copies(server, file):
        DAMAGE[kind](copy)
    assert ask(server, file.id) == sound[0]
    response = httpx.get(f"{server.url}/v1/files/{file.id}/adapter", timeout=60)
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        member = next(member for member in archive.getmembers() if member.name.endswith(WEIGHTS))
        assert archive.extractfile(member).read() == sound[1]
    assert ask(server, file.id) == sound[0]
