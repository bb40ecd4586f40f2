"""Engine and workers get shares of a machine's GPUs before either starts, and what has no room is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner
from vllm.config.cache import CacheConfig
from vllm.v1.worker.utils import request_memory

from f2l_vllm import models
from f2l_vllm.cli import gpus, workers
from f2l_vllm.cli.gpu_shares import Shares, divide, worker_bytes
from f2l_vllm.cli.gpus import Gpus
from f2l_vllm.cli.main import app
from f2l_vllm.cli.serve import plan
from f2l_vllm.engine.defaults import GPU_MEMORY
from f2l_vllm.hypernetwork import blocks
from f2l_vllm.pool.device import memory_fraction

GIB = 1 << 30
SMALL, LARGE = 4 * GIB, 8 * GIB  # what a worker needs for models of 0.5 and 2.2 thousand million numbers, about


def gpu(gib: int, count: int = 1) -> Gpus:
    return Gpus(tuple(map(str, range(count))), gib * GIB, count, (13, 0))


def divided(found: Gpus, workers: int = 1, need: int = SMALL, **given: Any) -> Shares:
    return divide(found, workers=workers, need=need, **{"asked": None, "engine_gpus": 1, **given})


@pytest.mark.parametrize("gib", [12, 16, 24, 48, 80, 192])
@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("need", [SMALL, LARGE])
def test_shares_that_nobody_gave_fit_a_gpu_together_or_are_refused(gib: int, many: int, need: int) -> None:
    room = GPU_MEMORY * gib * GIB - many * need
    if room < 0.2 * gib * GIB:
        with pytest.raises(ValueError, match="--worker-gpus 0"):
            divided(gpu(gib), many, need)
        return
    shares = divided(gpu(gib), many, need)
    assert shares.engine is not None
    assert many * shares.worker + shares.engine <= GPU_MEMORY + 1e-9
    assert shares.worker * gib * GIB >= need
    assert shares.engine >= 0.2


def test_vllm_wants_its_part_free_at_its_start_even_if_its_cache_is_bounded() -> None:
    """vLLM 0.32 and 0.33: whoever starts two engines on a GPU tells each its part."""
    memory = SimpleNamespace(total_memory=80 * GIB, free_memory=60 * GIB, device_="cuda")
    with pytest.raises(ValueError, match="on startup is less than desired GPU memory utilization"):
        request_memory(memory, CacheConfig(kv_cache_memory_bytes=GIB))
    assert request_memory(memory, CacheConfig(gpu_memory_utilization=0.5)) == 40 * GIB


def test_the_sum_is_what_vllm_takes_for_itself() -> None:
    assert CacheConfig().gpu_memory_utilization == GPU_MEMORY


@pytest.mark.parametrize(
    ("found", "many", "given", "shares"),
    [
        (Gpus(), 1, {}, Shares()),
        (Gpus(), 1, {"asked": 0.3}, Shares(0.3)),  # which `check_workers` refuses
        (gpu(80), 0, {}, Shares()),
        (gpu(80), 2, {"asked": 0.0}, Shares()),
        (gpu(80), 1, {}, Shares(0.1, 0.82)),
        (gpu(24), 1, {}, Shares(0.17, 0.75)),
        (gpu(80), 9, {}, Shares(0.08, 0.2)),
        (gpu(24), 3, {}, Shares(0.17, 0.41)),
        (gpu(80), 2, {"asked": 0.25}, Shares(0.25, 0.42)),
        (gpu(24), 1, {"utilization": 0.6}, Shares(0.17)),
        (gpu(24), 1, {"utilization": 0.82}, Shares(0.17)),
        (gpu(24), 1, {"utilization": 0.6, "asked": 0.4}, Shares(0.4)),
        (gpu(80), 1, {"part": 0.5}, Shares(0.1, 0.36)),  # another server has the other half
        (gpu(80), 0, {"part": 0.5}, Shares(0.0, 0.46)),
        (gpu(80), 1, {"part": 0.5, "asked": 0.0}, Shares(0.0, 0.46)),
        (gpu(80), 1, {"part": 0.5, "asked": 0.0, "utilization": 0.3}, Shares(0.0)),
        (gpu(80), 0, {"part": 0.5, "engine_gpus": 0}, Shares()),
        (Gpus(), 1, {"part": 0.5}, Shares()),
        (gpu(80, 2), 1, {"part": 0.5}, Shares(0.5, 0.46, "1")),
        (gpu(0), 1, {}, Shares(0.3, 0.62)),  # the driver does not tell the memory
        (gpu(24, 2), 1, {}, Shares(1.0, None, "1")),
        (gpu(24, 4), 2, {"engine_gpus": 2}, Shares(1.0, None, "2,3")),
        (gpu(24, 2), 3, {}, Shares(0.33, None, "1")),
        (gpu(24, 2), 1, {"asked": 0.5}, Shares(0.5, None, "1")),
        (gpu(24, 2), 1, {"engine_gpus": 2}, Shares(0.17, 0.75)),
        (gpu(12, 2), 1, {"engine_gpus": 2, "engine_need": 9 * GIB}, Shares(0.34, 0.58)),
        (Gpus(("3", "1"), 24 * GIB, 4), 1, {}, Shares(1.0, None, "1")),
        (gpu(24), 2, {"engine_gpus": 0}, Shares(0.5)),  # workers alone
    ],
)
def test_a_machine_is_divided(found: Gpus, many: int, given: dict[str, Any], shares: Shares) -> None:
    assert divided(found, many, **given) == shares


@pytest.mark.parametrize(
    ("found", "many", "given", "sentence"),
    [
        (gpu(24), 5, {}, "what the engine leaves"),
        (gpu(12), 1, {"engine_need": 9 * GIB}, "what the engine leaves"),
        (gpu(12), 1, {"asked": 0.4, "engine_need": 9 * GIB}, "leaves the engine no room"),
        (gpu(8), 1, {"need": LARGE}, "--worker-gpus 0"),
        (gpu(24), 1, {"utilization": 0.92}, "what --gpu-memory-utilization 0.92 leaves"),
        (gpu(24), 2, {"utilization": 0.6, "asked": 0.3}, "0.6 and 2 x --worker-gpus 0.3 are more than the GPU"),
        (gpu(24), 3, {"asked": 0.3}, "3 x --worker-gpus 0.3 leaves the engine no room"),
        (gpu(24), 1, {"asked": 1.0}, "leaves the engine no room"),
        (gpu(24, 2), 9, {}, "the GPUs that the engine leaves"),
    ],
)
def test_more_workers_than_shares_are_refused(found: Gpus, many: int, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        divided(found, many, **given)


def test_a_worker_needs_its_model_in_bf16_and_its_hypernetwork_in_fp32(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "empty" / "model.safetensors")
    rest = worker_bytes(tmp_path / "empty", tmp_path / "empty")
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"a": torch.zeros(1000, 10, dtype=dtype), "b": torch.zeros(5, dtype=dtype)}
        save_file(tensors, tmp_path / "m.safetensors")
        assert worker_bytes(tmp_path, tmp_path / "empty") - rest == 2 * 10_004
    model = models.resolve("f2l-tiny")
    raw = (model / "hypernetwork" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    total = sum(t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__")
    assert worker_bytes(tmp_path / "empty", model / "hypernetwork") - rest == 4 * (total // 2 - 1)  # kept in bf16


@pytest.mark.parametrize("gib", [12, 16, 24, 80])
def test_what_torch_may_take_of_a_share_has_room_for_the_weights_and_a_pass(gib: int, tmp_path: Path) -> None:
    numbers = 1000
    save_file({"a": torch.zeros(numbers)}, tmp_path / "model.safetensors")
    share = divided(gpu(gib), need=worker_bytes(tmp_path, tmp_path)).worker
    left = memory_fraction(share, gib * GIB) * gib * GIB - (2 + 4) * numbers
    limits = 4 * (blocks.ACCELERATOR.hidden + blocks.ACCELERATOR.scores + blocks.ACCELERATOR.context)
    assert left >= 2.5 * GIB >= 2.5 * limits  # what is read and made is there beside what is limited


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("F2L_WORKER_GPUS", "F2L_WORKER_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "find", lambda: gpu(24))


@pytest.mark.usefixtures("one_gpu")
class TestServe:
    def test_a_dry_run_shows_both_shares(self) -> None:
        told = CliRunner().invoke(app, ["serve", "--dry-run"]).output
        assert "F2L_WORKER_GPUS=0.13" in told
        assert "--gpu-memory-utilization 0.79" in told

    def test_doctor_shows_both_shares(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("f2l_vllm.cli.doctor._device", lambda: ("a GPU", "1 GiB", "13.0"))
        told = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "2000"}).output
        assert "1 with 0.13 of a GPU each" in told
        assert "--gpu-memory-utilization 0.79" in told

    def test_what_the_operator_gives_stays(self) -> None:
        argv = plan("f2l-tiny", {}, ["--gpu-memory-utilization", "0.5"]).argv
        assert argv.count("--gpu-memory-utilization") == 1
        assert "0.79" in plan("f2l-tiny", {}, ["--kv-cache-memory-bytes", "4G"]).argv  # of which it asks at its start
        launch = plan("f2l-tiny", {"F2L_WORKER_GPUS": "0.3"}, [])
        assert launch.env["F2L_WORKER_GPUS"] == "0.3"
        assert "0.62" in launch.argv
        for settings in ({"F2L_WORKER_GPUS": "0"}, {"F2L_HYPERNETWORK_WORKERS": "0"}):
            assert "--gpu-memory-utilization" not in plan("f2l-tiny", settings, []).argv

    def test_a_server_that_shares_the_gpus_takes_its_part(self) -> None:
        launch = plan("f2l-tiny", {"F2L_GPU_SHARE": "0.5", "F2L_HYPERNETWORK_WORKERS": "0"}, [])
        assert launch.argv[launch.argv.index("--gpu-memory-utilization") + 1] == "0.46"

    def test_workers_of_a_joined_cluster_are_its_own_affair(self) -> None:
        launch = plan("f2l-tiny", {"F2L_RAY_ADDRESS": "auto"}, [])
        assert "F2L_WORKER_GPUS" not in launch.env
        assert "--gpu-memory-utilization" not in launch.argv

    def test_workers_without_an_engine_have_the_gpu_for_themselves(self) -> None:
        one = workers.plan("f2l-tiny", {})
        assert (one.settings.worker_gpus, one.spec.gpus) == (1.0, 1.0)
        four = workers.plan("f2l-tiny", {"F2L_HYPERNETWORK_WORKERS": "4"})
        assert (four.settings.worker_gpus, four.spec.gpus) == (0.25, 0.25)
        beside = workers.plan("f2l-tiny", {"F2L_GPU_SHARE": "0.5", "F2L_HYPERNETWORK_WORKERS": "2"})
        assert beside.spec.gpus == 0.25
