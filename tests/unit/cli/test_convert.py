"""`f2l-vllm convert` as a user runs it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.hypernetwork.model import Hypernetwork
from tests.support import ROOT

RELEASED = ROOT / "tests" / "unit" / "hypernetwork" / "golden" / "hypernetwork.pt"


def convert(source: Path, output: Path, *flags: str, code: int = 0) -> str:
    """The output of `f2l-vllm convert …`, in one line."""
    result = CliRunner().invoke(app, ["convert", str(source), "-o", str(output), *flags])
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_weights_are_written_as_they_are(tmp_path: Path) -> None:
    convert(RELEASED, tmp_path / "safe")
    written = load_file(tmp_path / "safe" / "model.safetensors")
    for name, tensor in Hypernetwork.load(RELEASED, dtype=None).state_dict().items():
        assert written[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(written[name], tensor)


def test_weights_are_rounded_where_that_is_asked_for_and_stay_so(tmp_path: Path) -> None:
    convert(RELEASED, tmp_path / "half", "--dtype", "bf16")
    rounded = load_file(tmp_path / "half" / "model.safetensors")
    for name, tensor in Hypernetwork.load(RELEASED).state_dict().items():
        assert torch.equal(rounded[name], tensor.bfloat16())
    convert(tmp_path / "half", tmp_path / "again")
    again, half = (tmp_path / name / "model.safetensors" for name in ("again", "half"))
    assert again.read_bytes() == half.read_bytes()


@pytest.mark.parametrize("dtype", ["int8", ""])
def test_another_dtype_is_refused(dtype: str, tmp_path: Path) -> None:
    assert "--dtype is fp32 or bf16" in convert(RELEASED, tmp_path / "safe", "--dtype", dtype, code=2)
    assert not (tmp_path / "safe").exists()
