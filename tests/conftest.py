import gc
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.nodeid import coerce_node_id

if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time: a thread for each, and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # as in the pool's process

gc.disable()  # while modules are imported: nearly all of it stays


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported; the process that only hands out tests needs no torch."""
    if not config.getoption("numprocesses", None):
        from f2l_vllm import torch_shims

        torch_shims.install()


def pytest_collection_finish() -> None:
    """What is there when the tests begin is not looked through again and again for what has become garbage."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Number tests of one name, as schemathesis makes them: xdist would run one of them and pass over the others."""
    known: Counter[str] = Counter()
    for item in items:
        known[item.nodeid] += 1
        if (number := known[item.nodeid]) > 1:
            item._id = coerce_node_id(f"{item.nodeid}[{number}]")
    assert len({item.nodeid for item in items}) == len(items)


@pytest.fixture(scope="session")
def smolvlm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SmolVLM checkpoint in fp32, made once; read it, never write into it."""
    from tests.support.checkpoints import make_smolvlm

    return make_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="session")
def make_lora(smolvlm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_lora(rank=8, seed=0, **options)` writes a random PEFT adapter for `smolvlm_dir`, once per arguments."""
    from tests.support.checkpoints import make_lora

    made: dict[tuple, Path] = {}

    def make(rank: int = 8, seed: int = 0, **options: object) -> Path:
        key = (rank, seed, *sorted(options.items()))
        if key not in made:
            made[key] = make_lora(tmp_path_factory.mktemp(f"lora-{seed}-"), smolvlm_dir, rank, seed, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def hypernetwork_model(smolvlm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`smolvlm_dir` with a random hypernetwork beside it whose adapters change the model's answers."""
    import shutil

    import torch

    from f2l_vllm.base_models.shapes import BaseShapes
    from f2l_vllm.hypernetwork.config import HypernetworkConfig
    from f2l_vllm.hypernetwork.model import Hypernetwork

    directory = shutil.copytree(smolvlm_dir, tmp_path_factory.mktemp("model") / "base")
    shapes = BaseShapes.read(directory)
    torch.manual_seed(0)
    config = HypernetworkConfig(
        base_model="base",
        num_layers=shapes.layers,
        feature_size=shapes.modules["down_proj"][1],
        modules={"down_proj": shapes.modules["down_proj"]},
        rank=4,
        latent_size=32,
        num_blocks=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    hypernetwork = Hypernetwork(config)
    with torch.no_grad():
        hypernetwork.scaler_B["down_proj"].fill_(1.0)
    hypernetwork.save(directory / "hypernetwork", torch.bfloat16)
    return directory
