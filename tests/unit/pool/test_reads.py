"""How often an adapter's weights are read from the worker that makes them to the engine: the worker, the server's store
and the engine's loader are real, and all in this process."""

import hashlib
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from vllm.lora.request import LoRARequest

from f2l_vllm.engine.base_models.smolvlm import SmolVLMVideoForConditionalGeneration
from f2l_vllm.engine.lora_manager import HostTierLoRAManager
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE
from f2l_vllm.pool.messages import Published, WorkerSpec
from f2l_vllm.pool.worker import HypernetworkWorker
from f2l_vllm.store.cached_store import open_store
from tests.support.videos import write_video

_opened: list[Path] = []


def _note(event, args):
    """Files of weights that are opened to be read. What is only synced is opened by `os.open`, which names no mode."""
    if event == "open" and args[1] in ("r", "rb") and Path(str(args[0])).name == WEIGHTS_FILE:
        _opened.append(Path(args[0]))


@pytest.fixture(scope="module", autouse=True)
def _hook():
    sys.addaudithook(_note)  # it stays for as long as this process lives


@pytest.fixture
def published(hypernetwork_model, tmp_path):
    """A worker makes an adapter: the data folder, and the adapter's name."""
    home = tmp_path / "home"
    spec = WorkerSpec(
        model=hypernetwork_model,
        hypernetwork=hypernetwork_model / "hypernetwork",
        home=home,
        base_name="base",
        max_rank=64,
        threads=1,
    )
    worker, store = HypernetworkWorker(spec), open_store(home)
    video = write_video(tmp_path / "video.mp4", frames=10, fps=2)
    sha256, copy = hashlib.sha256(video.read_bytes()).hexdigest(), store.temporary()
    shutil.copy(video, copy)
    store.keep_video(copy, sha256)
    _opened.clear()
    *_, (name, outcome) = worker.internalize([("f2l-one", sha256)])
    assert isinstance(outcome, Published)
    yield home, name
    worker._decoder.close()


@pytest.fixture
def manager():
    """The engine's loader, for the linears that this model's adapters change."""
    manager = HostTierLoRAManager.__new__(HostTierLoRAManager)
    modules = {f"model.text_model.layers.{layer}.mlp.down_proj": None for layer in range(4)}
    manager._adapter_manager = Namespace(
        model=SmolVLMVideoForConditionalGeneration,
        supported_lora_modules=["down_proj"],
        packed_modules_mapping={},
        is_pooling_model=False,
        _is_moe=False,
        _get_lora_layer_weights=lambda lora, name: lora.get_lora(name),
    )
    manager.lora_config = Namespace(lora_dtype=torch.float32, max_lora_rank=64)
    manager._is_whole_model, manager._targets, manager._layout = True, set(modules), manager._read_layout
    return manager


@pytest.mark.parametrize("hot_bytes", [0, 64 << 20])
def test_an_adapters_weights_are_read_three_times_until_the_engine_has_them(published, manager, hot_bytes):
    home, name = published
    store = open_store(home, hot_bytes=hot_bytes)
    try:
        assert store.prepare(name) is bool(hot_bytes)
        path = store.load_path_at_once(name) or store.load_path(name)
        assert (path.parent == home / "adapters") is not bool(hot_bytes)
        loaded = manager._load_adapter(LoRARequest(name, 1, str(path)))
        assert len(loaded.loras) == 4
        assert len(_opened) == 3
        assert _opened[-1] == path / WEIGHTS_FILE
    finally:
        store.close()
