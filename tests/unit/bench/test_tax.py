"""The LoRA tax compares equal traffic, with vLLM's own client."""

from __future__ import annotations

from pathlib import Path

import pytest

from f2l_vllm.bench import shapes, vllm_client
from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.suites import tax
from f2l_vllm.engine import tuned


def row(traffic: str, streams: int, adapters: int, tokens: float, tpot: float, ttft: float) -> dict:
    figures = {"output_throughput": tokens, "median_tpot_ms": tpot, "median_ttft_ms": ttft}
    return {"traffic": traffic, "streams": streams, "adapters": adapters, **figures}


ROWS = [
    row("prefill", 1, 0, 0.0, 0.0, 760.0),
    row("prefill", 1, 1, 0.0, 0.0, 800.0),
    row("decode", 1, 0, 20.0, 50.0, 60.0),
    row("decode", 1, 1, 18.0, 55.0, 60.0),
    row("decode", 8, 0, 80.0, 100.0, 90.0),
    row("decode", 8, 8, 72.0, 112.5, 90.0),
]


def test_ratios_are_speeds_so_that_less_is_a_tax() -> None:
    ratios = {(r["traffic"], r["streams"], r["adapters"], r["over"]): r for r in tax.derive(ROWS)["ratios"]}
    assert ratios["prefill", 1, 1, "no LoRA"]["speed"] == 0.95
    eight = ratios["decode", 8, 8, "no LoRA"]
    assert (eight["speed"], eight["decode_speed"]) == (0.9, 0.8889)
    assert ratios["decode", 8, 0, "one stream"]["speed"] == 4.0
    assert ratios["decode", 8, 8, "one stream"]["speed"] == 4.0  # over one stream with an adapter
    assert len(ratios) == 5


def test_percentiles_that_few_requests_cannot_carry_are_left_out() -> None:
    assert not [name for name in tax.figures(9) if name.startswith("p")]
    assert {name[:3] for name in tax.figures(99) if name.startswith("p")} == {"p90"}
    assert {name[:3] for name in tax.figures(10_000) if name.startswith("p")} == {"p90", "p99"}
    assert "median_ttft_ms" in tax.figures(1)


def test_a_cell_has_no_more_adapters_than_streams() -> None:
    suite = suites.load("tax")
    assert isinstance(suite, suites.Tax)
    found = {(cell["traffic"], cell["streams"]): tax.adapters_of(suite, cell) for cell in tax.cells(suite)}
    assert found == {
        ("prefill", 1): [0, 1],
        ("decode", 1): [0, 1],
        ("decode", 8): [0, 1, 8],
        ("decode", 64): [0, 1, 8, 64],
    }


def test_vllm_0_32_bench_serve_takes_what_is_asked_of_it() -> None:
    args = vllm_client.arguments(
        "http://127.0.0.1:1",
        "base",
        Path("model"),
        input_tokens=16,
        output_tokens=64,
        requests=8,
        concurrency=4,
        adapters=("a", "b"),
        seed=3,
    )
    assert (args.model, args.served_model_name, args.dataset_name) == ("model", "base", "random")
    assert (args.random_input_len, args.random_output_len, args.num_prompts, args.max_concurrency) == (16, 64, 8, 4)
    assert (args.lora_modules, args.lora_assignment) == (["a", "b"], "round-robin")
    assert (args.temperature, args.seed, args.ready_check_timeout_sec) == (0.0, 3, 0)


def test_kernels_are_tuned_for_the_adapters_that_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = shapes.of_shape(shapes.TINY, tmp_path)
    with pytest.raises(ValueError, match="leave it out"):
        tax.tuned_kernels(subject, 64, 20, tmp_path, print)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L4")
    measured: list[tuned.Product] = []
    said: list[str] = []
    found = tax.tuned_kernels(
        subject, 64, 20, tmp_path / "kernels", said.append, lambda one: measured.append(one) or (lambda *_: 1.0)
    )
    assert found == {tuned.VARIABLE: str(tmp_path / "kernels")}
    assert [(one.slots, one.rank) for one in measured] == [(64, 32)]
    assert tuned.has(tmp_path / "kernels", "NVIDIA L4", measured)
    assert said[0].startswith("shrink, 1 rows: ")
