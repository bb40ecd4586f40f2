from collections.abc import Callable
from pathlib import Path

import pytest

from f2l_vllm import torch_shims

torch_shims.install()


@pytest.fixture(scope="session")
def smolvlm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SmolVLM checkpoint in fp32, made once; read it, never write into it."""
    from checkpoints import make_smolvlm

    return make_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="session")
def make_lora(smolvlm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_lora(rank=8, seed=0, **options)` writes a random PEFT adapter for `smolvlm_dir`, once per arguments."""
    from checkpoints import make_lora

    made: dict[tuple, Path] = {}

    def make(rank: int = 8, seed: int = 0, **options: object) -> Path:
        key = (rank, seed, *sorted(options.items()))
        if key not in made:
            made[key] = make_lora(tmp_path_factory.mktemp(f"lora-{seed}-"), smolvlm_dir, rank, seed, **options)
        return made[key]

    return make
