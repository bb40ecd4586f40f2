"""Whoever is imported first, nothing fails for the CUDA builds that lie beside a CPU torch.

Each order but one runs in a fresh process of this environment, in which this package has its entry points as
`pyproject.toml` names them, so that what was installed when does not matter. Where torch is built for a GPU the orders
hold anyway.
"""

import importlib
import os
import subprocess
import sys
import tomllib

import pytest

from tests.support import ROOT


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("site")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        line for name, points in groups.items() for line in (f"[{name}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    info = folder / "f2l_vllm-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: f2l-vllm\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


def run(code: str, environment: dict[str, str]) -> None:
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]


LOOKED = "from transformers.utils import is_torchaudio_available as a, is_torchcodec_available as c; a(); c()"


def test_transformers_first_then_plain_peft(environment: dict[str, str]) -> None:
    run(f"{LOOKED}; from transformers import audio_utils; import peft", environment)


def test_what_brings_torch_in_may_be_what_its_library_breaks(environment: dict[str, str]) -> None:
    run("import torchvision, torchaudio", environment)


def test_a_process_in_which_torch_loads_no_backends_is_served_by_our_own_call(environment: dict[str, str]) -> None:
    code = f"{LOOKED}; import torch; from f2l_vllm import torch_shims; torch_shims.install()"
    code += "; from transformers import audio_utils; import torchvision"
    run(code, {**environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})


def test_our_own_call_may_be_what_brings_torch_in() -> None:
    """As in this process, where `tests/conftest.py` makes it first of all."""
    for package in ("torchvision", "torchaudio"):
        importlib.import_module(package)
