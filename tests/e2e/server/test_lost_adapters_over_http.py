"""Adapters whose files are damaged or gone, or that the engine refuses or has dropped: on disk, resident, streamed."""

import shutil
import sqlite3

import httpx
import openai
import pytest

from f2l_vllm.client import metric
from f2l_vllm.engine.residency import FIRST_ADAPTER_ID
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE
from f2l_vllm.store import manifest
from tests.support.videos import write_video

GREEDY = {"messages": [{"role": "user", "content": "What happens?"}], "temperature": 0, "max_tokens": 8}


class Life:
    """Videos of a server whose workers' methods can be called from outside, and whose adapters lie on disk only."""

    def __init__(self, server, folder):
        self.server, self.folder, self.made = server, folder, 0

    def upload(self):
        self.made += 1
        path = write_video(self.folder / f"{self.made}.mp4", frames=16 + self.made, fps=8, size=(64, 48))
        return self.server.upload(path)

    def adapter(self, file):
        return self.server.adapter_folder(file.model_extra["f2l"]["adapter"])

    def ask(self, file, stream):
        answer = self.server.client.chat.completions.create(model=file.id, stream=stream, **GREEDY)
        if not stream:
            return answer.choices[0].message.content
        return "".join(choice.delta.content or "" for chunk in answer for choice in chunk.choices)

    def drop_from_the_engine(self, file):
        """As new base weights do."""
        with sqlite3.connect(self.server.home / "catalog.sqlite3") as catalog:
            query = "SELECT adapters.id FROM adapters JOIN files ON adapter_name = name WHERE files.id = ?"
            ((number,),) = catalog.execute(query, (file.id,)).fetchall()
        body = {"method": "remove_lora", "args": [FIRST_ADAPTER_ID + number]}
        headers = {"Authorization": f"Bearer {self.server.client.api_key}"}
        answer = httpx.post(f"{self.server.url}/collective_rpc", json=body, headers=headers)
        assert answer.json() == {"results": ["True"]}


@pytest.fixture(scope="module")
def life(other_server, tmp_path_factory):
    return Life(other_server, tmp_path_factory.mktemp("lost"))


def flip_the_last_byte(adapter):
    data = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / WEIGHTS_FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 0xFF]))


DAMAGE = {
    "flipped": flip_the_last_byte,
    "cut short": lambda adapter: (adapter / WEIGHTS_FILE).write_bytes((adapter / WEIGHTS_FILE).read_bytes()[:-100]),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_made_again_for_whoever_asks(life, damage):
    file = life.upload()
    sound = (life.adapter(file) / WEIGHTS_FILE).read_bytes()
    DAMAGE[damage](life.adapter(file))
    first = life.ask(file, stream=damage == "gone")
    assert (life.adapter(file) / WEIGHTS_FILE).read_bytes() == sound
    DAMAGE[damage](life.adapter(file))
    assert life.ask(file, stream=False) == first  # it is in the engine


def test_an_adapter_that_cannot_be_made_again_says_to_upload_the_video_again(life):
    file = life.upload()
    DAMAGE["gone"](life.adapter(file))
    for path in (life.server.home / "videos").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(openai.UnprocessableEntityError) as error:
        life.ask(file, stream=False)
    assert error.value.code == "video_failed"
    assert "upload" in error.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_the_engine_refuses_is_unavailable_for_now(life, stream):
    file = life.upload()
    adapter = life.adapter(file)
    sound = shutil.copytree(adapter, life.folder / f"sound-{stream}")
    (adapter / WEIGHTS_FILE).write_bytes(b"\x10" + b"\0" * 7 + b"not a safetensor")
    (adapter / manifest.MANIFEST_FILE).unlink()
    manifest.write(adapter, adapter.name, {})  # whatever the reason is, its files are what was written
    with pytest.raises(openai.InternalServerError) as error:
        life.ask(file, stream)
    assert (error.value.status_code, error.value.code) == (503, "adapter_unavailable")
    assert int(error.value.response.headers["Retry-After"]) > 0
    assert "Ask again" in error.value.message
    shutil.rmtree(adapter)
    sound.rename(adapter)
    assert life.ask(file, stream)


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_the_engine_dropped_and_cannot_load_again_comes_back_with_the_next_question(life, stream):
    file = life.upload()
    expected = life.ask(file, stream)
    life.drop_from_the_engine(file)
    assert life.ask(file, stream) == expected  # its files are there
    life.drop_from_the_engine(file)
    DAMAGE["gone"](life.adapter(file))
    with pytest.raises(openai.APIError) as error:
        life.ask(file, stream)
    assert error.value.code == "adapter_unavailable"
    if not stream:
        assert (error.value.status_code, int(error.value.response.headers["Retry-After"]) > 0) == (503, True)
    assert life.ask(file, stream) == expected
    assert metric(life.server.url, "f2l_adapter_leases") == 0
