"""GPUs are counted as the driver and CUDA count them, and one that cannot be used is named with the reason."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray._private.thirdparty import pynvml
from typer.testing import CliRunner

from f2l_vllm.cli import gpus
from f2l_vllm.cli.gpu_shares import Shares
from f2l_vllm.cli.gpus import Gpus, visible
from f2l_vllm.cli.main import app
from f2l_vllm.cli.serve import plan


@dataclass
class Driver:
    """What NVML says on the machine of a test: its GPUs have the ids GPU-a0…, GPU-b1…, and so on."""

    sizes: tuple[int, ...] = (80 << 30,)
    cuda: int = 13000
    fails: int | None = None  # an NVML error code
    slices: dict[int, tuple[int, ...]] = field(default_factory=dict)  # sizes of the instances of GPUs in MIG mode

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def init() -> None:
            if self.fails is not None:
                raise pynvml.NVMLError(self.fails)

        def size(of: int | tuple[int, int]) -> int:
            return self.sizes[of] if isinstance(of, int) else self.slices[of[0]][of[1]]

        def piece(of: int, index: int) -> tuple[int, int]:
            if index % 2 or index // 2 >= len(self.slices[of]):  # every second place is free
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
            return of, index // 2

        def mode(of: int) -> list[int]:
            if not self.slices:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return [int(of in self.slices)] * 2

        answers = {
            "nvmlInit": init,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self.sizes),
            "nvmlSystemGetCudaDriverVersion": lambda: self.cuda,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda of: f"NVIDIA H100 {of}",
            "nvmlDeviceGetUUID": uuid,
            "nvmlDeviceGetMigMode": mode,
            "nvmlDeviceGetMaxMigDeviceCount": lambda _of: 7,
            "nvmlDeviceGetMigDeviceHandleByIndex": piece,
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda of: of[0],
            "nvmlDeviceGetGpuInstanceId": lambda of: of[1] + 1,
            "nvmlDeviceGetComputeInstanceId": lambda _of: 0,
            "nvmlDeviceGetMemoryInfo": lambda of: SimpleNamespace(total=size(of)),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)


def uuid(of: int | tuple[int, int]) -> str:
    return f"GPU-{'abc'[of]}{of}-77" if isinstance(of, int) else f"MIG-{'def'[of[0]]}{of[1]}-77"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "F2L_CPU_PLATFORM", "F2L_WORKER_GPUS"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test, whatever sets it
        monkeypatch.delenv(name)


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
    monkeypatch.setenv("F2L_CPU_PLATFORM", "1")
    assert gpus.find() == Gpus()


@pytest.mark.parametrize(
    ("text", "ids", "gib", "name"),
    [
        ("0", ["0"], 80, "0"),
        ("1,0", ["1", "0"], 24, "1"),
        ("2,-1,1", ["2"], 4, "2"),
        ("GPU-a0-77", ["GPU-a0-77"], 80, "0"),
        ("GPU-b,GPU-a0", ["GPU-b", "GPU-a0"], 24, "1"),
        ("GPU-b1-77,-1,GPU-c2-77", ["GPU-b1-77"], 24, "1"),
        ("-1", [], 0, None),
        ("NoDevFiles", [], 0, None),
    ],
)
def test_the_memory_is_that_of_the_gpus_a_process_sees(
    text: str, ids: list[str], gib: int, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Driver((80 << 30, 24 << 30, 4 << 30)).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    named = None if name is None else f"NVIDIA H100 {name}"
    assert gpus.find() == Gpus(tuple(ids), gib << 30, 3, (13, 0), name=named)


def test_a_small_hidden_gpu_refuses_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver((80 << 30, 1 << 30)).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert plan("f2l-tiny", {}, []).shares == Shares(0.1, 0.82)


@pytest.mark.parametrize(
    ("text", "seen", "gib", "name"),
    [
        ("MIG-e0-77", "MIG-e0-77", 20, (1, 0)),
        ("MIG-e1", "MIG-e1", 10, (1, 1)),
        ("MIG-e1,MIG-e0", "MIG-e1", 10, (1, 1)),
        ("MIG-GPU-b1-77/2/0", "MIG-GPU-b1-77/2/0", 10, (1, 1)),
        ("1", "1", 20, (1, 0)),
        ("0,1", "1", 20, (1, 0)),
        ("GPU-b", "GPU-b", 20, (1, 0)),
        (None, "1", 20, (1, 0)),
    ],
)
def test_a_mig_instance_has_its_own_memory_and_is_the_only_gpu(
    text: str | None, seen: str, gib: int, name: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    Driver((80 << 30, 80 << 30), slices={1: (20 << 30, 10 << 30)}).install(monkeypatch)
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert gpus.find() == Gpus((seen,), gib << 30, 2, (13, 0), name=f"NVIDIA H100 {name}")


def test_a_gpu_in_mig_mode_without_an_instance_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver((80 << 30, 24 << 30), slices={1: ()}).install(monkeypatch)
    assert gpus.find().ids == ("0",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ValueError, match="GPU 1 is in MIG mode and has no instance: make one"):
        gpus.find()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0,2", "this machine has no GPU 2, but 2, counted from 0"),
        ("7", "this machine has no GPU 7"),
        ("0,GPU-b", "mixes ways to name a GPU"),
        ("GPU-a,1", "mixes|no GPU 1"),
        ("1,1", "names a GPU twice"),
        ("GPU-a,GPU-a0", "names a GPU twice"),
        ("GPU-x", "GPU-x names nothing on this machine: give a whole name that nvidia-smi -L lists"),
        ("GPU-", "GPU- names 2 devices of this machine"),
        ("MIG-x", "MIG-x names nothing on this machine"),
        ("MIG-", "MIG- names 2 devices"),
    ],
)
def test_a_gpu_that_is_not_there_is_named(text: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Driver((80 << 30, 80 << 30), slices={1: (20 << 30, 10 << 30)}).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    for command in ("serve", "doctor"):
        monkeypatch.setattr("f2l_vllm.cli.doctor._device", lambda: ("a GPU", "1 GiB", "13.0"))
        result = CliRunner().invoke(app, [command, *["--dry-run"][: command == "serve"]], env={"COLUMNS": "1000"})
        assert result.exit_code
        assert re.search(sentence, result.output), result.output
        assert "Traceback" not in result.output
    with pytest.raises(ValueError, match=sentence):
        gpus.find()


def test_numbers_are_the_drivers_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver((4 << 30, 80 << 30)).install(monkeypatch)
    assert plan("f2l-tiny", {"F2L_WORKER_GPUS": "0"}, []).env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert "CUDA_DEVICE_ORDER" not in plan("f2l-tiny", {"F2L_WORKER_GPUS": "0"}, []).env


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
