"""GPUs are counted as the driver and CUDA count them, and one that cannot be used is named with the reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray._private.thirdparty import pynvml
from typer.testing import CliRunner

from f2l_vllm.cli import gpus
from f2l_vllm.cli.gpus import Gpus, visible
from f2l_vllm.cli.main import app
from f2l_vllm.cli.serve import plan


@dataclass
class Driver:
    """What NVML says on the machine of a test."""

    sizes: tuple[int, ...] = (80 << 30,)
    cuda: int = 13000
    fails: int | None = None  # an NVML error code

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def init() -> None:
            if self.fails is not None:
                raise pynvml.NVMLError(self.fails)

        answers = {
            "nvmlInit": init,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self.sizes),
            "nvmlSystemGetCudaDriverVersion": lambda: self.cuda,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda of: f"NVIDIA H100 {of}",
            "nvmlDeviceGetHandleByUUID": lambda _uuid: "slice",
            "nvmlDeviceGetMemoryInfo": lambda of: SimpleNamespace(total=10 << 30 if of == "slice" else self.sizes[of]),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "F2L_CPU_PLATFORM", "F2L_WORKER_GPUS"):
        monkeypatch.delenv(name, raising=False)


LISTS = ["0,1", "", "-1", "2,-1,3", "0,1,2,3,4,5", "1,1", " 1 ", "1gpu2,2ampere", "x", "3", "4", "NoDevFiles", "+2"]


@pytest.mark.parametrize("text", [None, *LISTS])
def test_a_list_of_visible_gpus_is_read_as_torch_reads_it(text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    seen = torch.cuda._parse_visible_devices()
    beyond = next((i for i, one in enumerate(seen) if isinstance(one, int) and one >= 4), len(seen))
    assert visible(text, 4) == tuple(map(str, seen[:beyond]))


def test_gpus_may_be_named_by_their_ids() -> None:
    assert visible("GPU-a,GPU-b,1", 4) == ("GPU-a", "GPU-b")
    assert visible("GPU-a,GPU-a", 4) == ()
    assert visible("MIG-a,MIG-b", 1) == ("MIG-a",)


def test_a_machine_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver((80 << 30, 24 << 30), 12080).install(monkeypatch)
    assert gpus.find() == Gpus(("0", "1"), 24 << 30, 2, (12, 8), name="NVIDIA H100 0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus.find() == Gpus(("1",), 24 << 30, 2, (12, 8), name="NVIDIA H100 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert gpus.find() == Gpus(("MIG-1",), 10 << 30, 2, (12, 8), name="NVIDIA H100 slice")
    monkeypatch.setenv("F2L_CPU_PLATFORM", "1")
    assert gpus.find() == Gpus()


def test_a_machine_without_a_driver_has_no_gpu_and_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(fails=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND).install(monkeypatch)
    assert gpus.find() == Gpus()
    assert gpus.find().unused() is None


def test_hidden_gpus_are_not_looked_for_by_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver().install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch = plan("f2l-tiny", {}, [])
    assert launch.env["F2L_CPU_PLATFORM"] == "1"
    assert "float32" in launch.argv  # as on a machine without a GPU
    assert "hides the GPU" in str(launch.gpus.unused())
    elsewhere = plan("f2l-tiny", {}, ["--distributed-executor-backend", "ray"])  # its workers see their own
    assert "F2L_CPU_PLATFORM" not in elsewhere.env
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "F2L_CPU_PLATFORM" not in plan("f2l-tiny", {}, []).env


@pytest.mark.parametrize("dtype", ["float32", "float"])
def test_a_dtype_that_vllms_lora_kernels_do_not_take_is_refused_on_a_gpu(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Path(find_spec("vllm").submodule_search_locations[0]) / "lora" / "ops" / "triton_ops"
    for name in ("lora_shrink_op.py", "lora_expand_op.py"):
        assert "assert weight.dtype in [torch.float16, torch.bfloat16]" in (kernels / name).read_text()
    Driver().install(monkeypatch)
    for flags in (["--dtype", "bfloat16"], ["--dtype", "auto"], []):
        plan("f2l-tiny", {}, flags)
    with pytest.raises(ValueError, match=f"--dtype {dtype}: on a GPU"):
        plan("f2l-tiny", {}, ["--dtype", dtype])
    monkeypatch.setenv("F2L_CPU_PLATFORM", "1")
    plan("f2l-tiny", {}, ["--dtype", dtype])


def test_a_driver_that_does_not_answer_is_said_and_not_taken_for_a_machine_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Driver(fails=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH).install(monkeypatch)
    result = CliRunner().invoke(app, ["serve", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "the GPU's driver does not answer (RM has detected an NVML/RM version mismatch" in result.stderr
    assert "so this runs on the CPU" in result.stderr
    monkeypatch.setattr("f2l_vllm.cli.doctor._device", lambda: ("no GPU", "1 GiB", None))
    told = " ".join(CliRunner().invoke(app, ["doctor"], env={"F2L_HOME": os.devnull}).output.split())
    assert "the GPU's driver does not answer" in told


@pytest.mark.parametrize(
    ("driver", "built_for", "sentence"),
    [
        (12080, "13.0", "runs CUDA up to 12.8, and torch is built for 13.0"),
        (13000, "13.2", None),  # within one major version, newer programs run on older drivers
        (13010, "12.8", None),
        (13000, None, "torch is built without CUDA"),
    ],
)
def test_doctor_says_when_torch_cannot_use_the_gpu(
    driver: int, built_for: str | None, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Driver(cuda=driver).install(monkeypatch)
    monkeypatch.setattr("f2l_vllm.cli.doctor._device", lambda: ("a GPU", "1 GiB", built_for))
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "1000"})
    if sentence is None:
        assert "torch is built" not in result.output
    else:
        assert sentence in result.output
        assert result.exit_code == 1
