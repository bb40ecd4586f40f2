"""Contracts with vLLM's reader of tuned LoRA kernels, and the search, against a kernel whose times are known."""

from __future__ import annotations

import inspect
import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand_op, lora_shrink_op, utils

from f2l_vllm import vllm_versions
from f2l_vllm.cli import gpus, tune
from f2l_vllm.cli.main import app
from f2l_vllm.cli.serve import plan
from f2l_vllm.engine import tuned, tuning
from f2l_vllm.engine.tuned import Config, Product
from f2l_vllm.server.inputs import Inputs

GPU = "NVIDIA A100-SXM4 40GB"
H500M = Product(slots=32, rank=64, d_in=2560, d_out=960)
CHANGED = f"vLLM {vllm_versions.installed()} reads tuned LoRA kernels another way: see engine/tuned.py"


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Config]]:
    """`read(operation, rows, product)`: what vLLM's own reader finds in `tmp_path`."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: GPU)

    def call(operation: str, rows: int, product: Product, slices: int = 1) -> Config:
        for cached in (utils.load_lora_op_config, utils.get_lora_op_configs):
            cached.cache_clear()
        found: Config = utils.get_lora_op_configs(
            operation,
            max_loras=product.slots + 1,
            batch=rows,
            hidden_size=product.d_in if operation == "shrink" else product.d_out,
            rank=product.rank,
            num_slices=slices,
            **({"add_inputs": True} if operation == "expand" else {}),
        )
        return found

    yield call
    for cached in (utils.load_lora_op_config, utils.get_lora_op_configs):
        cached.cache_clear()


@pytest.mark.parametrize("operation", tuned.OPERATIONS)
def test_vllm_reads_back_what_is_written(read: Callable[..., Config], tmp_path: Path, operation: str) -> None:
    other = Product(slots=32, rank=64, d_in=8192, d_out=2048)
    for product, width in ((H500M, 16), (other, 64)):
        found = {rows: tuning.default(operation, rows) | {"block_m": width, "num_warps": rows} for rows in (1, 16)}
        tuned.write(tmp_path, GPU, operation, product, found)
    for product, width in ((H500M, 16), (other, 64)):
        for rows, nearest in ((1, 1), (16, 16), (10, 16), (9000, 16)):
            config = read(operation, rows, product)
            assert (config["block_m"], config["num_warps"]) == (width, nearest), CHANGED


@pytest.mark.parametrize("operation", tuned.OPERATIONS)
@pytest.mark.parametrize("rows", [1, 127, 128, 8192])
def test_the_search_begins_with_vllms_own_configuration(read: Callable[..., Config], operation: str, rows: int) -> None:
    assert read(operation, rows, H500M) == tuning.default(operation, rows), CHANGED


def test_a_number_of_slices_that_was_not_tuned_ends_vllms_reader(read: Callable[..., Config], tmp_path: Path) -> None:
    """Why only linears that vLLM does not merge are served from these files."""
    tuned.write(tmp_path, GPU, "shrink", H500M, {1: tuning.default("shrink", 1)})
    with pytest.raises(KeyError):
        read("shrink", 1, H500M, slices=2)
    assert tuned.products({"down_proj": (2560, 960)}, 32, 64) == [H500M]
    assert tuned.products({"down_proj": (2560, 960), "gate_proj": (960, 2560)}, 32, 64) is None


def test_the_kernels_take_what_the_timer_gives_them() -> None:
    meta = ["token_lora_mapping", "token_indices_sorted_by_lora_ids", "num_tokens_per_lora", "lora_token_start_loc"]
    meta += ["lora_ids", "no_lora_flag_cpu", "num_active_loras"]
    common = ["output_tensor", *meta]
    for module, function, expected in (
        (lora_shrink_op, "_lora_shrink", ["inputs", "lora_a_weights", *common, "scaling"]),
        (lora_expand_op, "_lora_expand", ["inputs", "lora_b_weights", *common, "offset_start", "add_inputs"]),
    ):
        source = inspect.unwrap(getattr(module, function))
        assert list(inspect.signature(source).parameters) == expected, CHANGED
        assert "get_lora_op_configs(" in inspect.getsource(source), CHANGED
        assert hasattr(module, "get_lora_op_configs"), CHANGED
    assert len(LoRAKernelMeta.make(2, 4, "cpu").meta_args(4, False)) == len(meta), CHANGED


class Bench:
    """Takes 7 ms for each launch, and sees which adapters they use."""

    def __init__(self, launched: list[Config]) -> None:
        self.launched = launched
        self.used: list[int] = []  # addresses

    def __call__(self, call: Callable[[], None]) -> float:
        before = len(self.launched)
        self.used.clear()
        call()
        return 7.0 * (len(self.launched) - before)


@pytest.mark.parametrize("rows", [1, 3, 10, 100])
def test_the_timer_checks_results_and_gives_each_configuration_to_the_kernels(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' part is torch's here; Triton needs a GPU."""
    seen: list[Config] = []
    off = 0.0
    signs = {"shrink": inspect.signature(lora_shrink_op._lora_shrink), "expand": None}
    signs["expand"] = inspect.signature(lora_expand_op._lora_expand)

    def kernel(operation: str, *given: Any) -> None:
        named = signs[operation].bind(*given).arguments
        module = lora_shrink_op if operation == "shrink" else lora_expand_op
        seen.append(module.get_lora_op_configs(operation, batch=rows))
        slot_of_M = named["token_lora_mapping"].long()
        (weights,) = named["lora_a_weights" if operation == "shrink" else "lora_b_weights"]
        bench.used += [weights[slot].data_ptr() for slot in slot_of_M.unique().tolist()]
        if operation == "shrink":
            out = named["output_tensor"][0]
            out.copy_(torch.einsum("mi,mri->mr", named["inputs"].float(), weights[slot_of_M, 0].float()) + off)
        else:
            out = named["output_tensor"]
            out.add_(torch.einsum("mr,mor->mo", named["inputs"][0], weights[slot_of_M, 0].float()) + off)

    monkeypatch.setattr(lora_shrink_op, "_lora_shrink", partial(kernel, "shrink"))
    monkeypatch.setattr(lora_expand_op, "_lora_expand", partial(kernel, "expand"))
    product, bench, cache = Product(4, 8, 48, 32), Bench(seen), 10_000
    timer = tuning.KernelTimer(product, "cpu", bench, cache)
    for operation in tuned.OPERATIONS:
        seen.clear()
        config = tuning.default(operation, rows)
        assert timer(operation, rows, config) == 7.0
        assert all(given is config for given in seen)
        assert len(bench.used) == len(set(bench.used))  # no adapter is used twice
        an_adapter = 2 * math.prod(product.sizes(operation))
        assert cache < len(bench.used) * an_adapter <= 2 * cache + product.slots * an_adapter
    off = 0.1
    assert [timer(operation, rows, {}) for operation in tuned.OPERATIONS] == [math.inf] * 2
    assert lora_shrink_op.get_lora_op_configs is utils.get_lora_op_configs


def test_defaults_launch_thousands_of_blocks_for_ten_rows() -> None:
    assert tuning.blocks("shrink", 10, H500M, tuning.default("shrink", 10)) == 8448


def known(best: Config) -> tuning.Time:
    """A kernel that is fastest with `best`, and slower by each value that differs."""
    return lambda _operation, _rows, config: 1.0 + sum(config[name] != value for name, value in best.items())


def test_the_search_finds_a_better_configuration_one_value_at_a_time() -> None:
    best = {"split_k": 4, "block_k": 128, "block_n": 64, "num_warps": 8}
    config, after, before = tuning.search("shrink", 10, known(best))
    assert {name: config[name] for name in best} == best
    assert (after, before) == (1.0, 5.0)
    assert config["max_nreg"] is None


def test_what_is_hardly_faster_or_cannot_run_is_left() -> None:
    def time(_operation: str, _rows: int, config: Config) -> float:
        if config["num_warps"] == 8:
            return math.inf
        return 0.99 if config["block_m"] == 16 else 1.0

    assert tuning.search("expand", 1, time)[0] == tuning.default("expand", 1)
    with pytest.raises(RuntimeError, match="does not run here"):
        tuning.search("expand", 1, lambda *_: math.inf)


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a machine with one GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setattr(gpus, "find", lambda: gpus.Gpus(("0",), 80 << 30, 1, (13, 0), name=GPU))
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return tmp_path / "f2l-vllm" / "lora-kernels"


def test_serve_uses_what_was_tuned_for_its_gpu_slots_and_rank(
    on_a_gpu: Path, read: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tuned.VARIABLE)
    assert tuned.VARIABLE not in plan("f2l-tiny", {}, []).env
    measured = []

    def timer(product: Product) -> tuning.Time:
        measured.append(product)
        return known({"split_k": 1} if product.slots else {})

    def time_of(product: Product) -> tuning.Time:
        found = timer(product)
        return lambda operation, rows, config: found(operation, rows, {"split_k": 1, **config})

    inputs = Inputs.read("f2l-tiny", {})
    tune.tune(inputs, Namespace(), overwrite=False, timer=time_of)
    (product,) = measured
    assert sorted(path.name for path in on_a_gpu.iterdir()) == [
        "NVIDIA_A100_SXM4_40GB_EXPAND_TRUE.json",
        "NVIDIA_A100_SXM4_40GB_SHRINK.json",
    ]
    assert plan("f2l-tiny", {}, []).env[tuned.VARIABLE] == str(on_a_gpu)
    monkeypatch.setenv(tuned.VARIABLE, str(on_a_gpu))
    assert read("shrink", 10, product)["split_k"] == 1
    assert tuned.VARIABLE not in plan("f2l-tiny", {}, []).env  # the operator's stays
    monkeypatch.delenv(tuned.VARIABLE)
    for other in (["--max-loras", "8"], ["--max-lora-rank", "64"], ["--lora-target-modules", "down_proj", "q_proj"]):
        assert tuned.VARIABLE not in plan("f2l-tiny", {}, other).env
    monkeypatch.setattr(gpus, "find", lambda: gpus.Gpus(("0",), 80 << 30, 1, (13, 0), name="NVIDIA L4"))
    assert tuned.VARIABLE not in plan("f2l-tiny", {}, []).env


def test_a_gpu_is_tuned_once(on_a_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, times = Inputs.read("f2l-tiny", {}), []

    def timer(product: Product) -> tuning.Time:
        times.append(product)
        return lambda *_: 1.0

    tune.tune(inputs, Namespace(), overwrite=False, timer=timer)
    tune.tune(inputs, Namespace(), overwrite=False, timer=timer)
    assert len(times) == 1
    assert f"{GPU} is tuned already" in capsys.readouterr().out
    tune.tune(inputs, Namespace(), overwrite=True, timer=timer)
    tune.tune(inputs, Namespace(max_loras=8), overwrite=False, timer=timer)
    assert [product.slots for product in times] == [32, 32, 8]
    assert set(json.loads((on_a_gpu / tuned.file_name(GPU, "shrink")).read_text())) == {"33", "9"}


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "find", gpus.Gpus)
    ended = CliRunner().invoke(app, ["tune"])
    assert ended.exit_code == 2
    assert "this machine has no NVIDIA GPU" in " ".join(ended.output.split())
