"""What the engine is started with, here, in vLLM and in the documentation."""

from __future__ import annotations

import inspect
from argparse import Namespace
from dataclasses import fields
from typing import Any, get_args

import pytest
from vllm.config import ParallelConfig, vllm
from vllm.config.lora import MaxLoRARanks

from f2l_vllm.engine.defaults import KEEP_ALIVE_SECONDS, engine_flags, is_on_one_machine
from f2l_vllm.hypernetwork.ranks import RANKS, smallest_rank
from tests.support import ROOT

DEPLOY = ROOT / "docs" / "deploy.md"


def test_ranks_are_those_of_vllm_0_32() -> None:
    assert get_args(MaxLoRARanks) == RANKS


def test_an_adapter_gets_the_smallest_rank_that_holds_it() -> None:
    assert [smallest_rank(rank) for rank in (1, 2, 32, 33, 300, 512)] == [1, 8, 32, 64, 320, 512]
    assert smallest_rank(513) is None


def test_every_request_of_a_step_may_have_an_adapter_of_its_own() -> None:
    flags = engine_flags(rank=64, modules=["down_proj"], is_small=False, has_gpu=False)
    slots, places, sequences = (int(flags[name][0]) for name in ("--max-loras", "--max-cpu-loras", "--max-num-seqs"))
    assert places >= slots >= sequences


def test_a_gpu_takes_as_many_requests_as_vllm_chooses_for_it() -> None:
    flags = engine_flags(rank=64, modules=["down_proj"], is_small=False, has_gpu=True)
    assert "--max-num-seqs" not in flags
    assert flags["--max-loras"] == ["32"]
    assert "max_num_seqs * decode_query_len * 2" in inspect.getsource(vllm)  # the largest CUDA graph


@pytest.mark.parametrize(
    ("given", "one"),
    [
        ({}, True),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, True),
        ({"distributed_executor_backend": "ray"}, False),
        ({"nnodes": 2, "distributed_executor_backend": "mp"}, False),
    ],
)
def test_an_engine_of_several_machines_is_told_by_flags_and_by_vllms_config(given: dict[str, Any], one: bool) -> None:
    assert is_on_one_machine(Namespace(**given)) is one
    assert {"nnodes", "distributed_executor_backend"} <= {field.name for field in fields(ParallelConfig)}
    assert is_on_one_machine(ParallelConfig()) is True


def test_only_a_small_model_without_a_gpu_is_served_in_another_dtype() -> None:
    def dtype(is_small: bool, has_gpu: bool) -> list[str] | None:
        return engine_flags(rank=64, modules=["down_proj"], is_small=is_small, has_gpu=has_gpu).get("--dtype")

    assert dtype(True, False) == ["float32"]
    assert dtype(True, True) is dtype(False, False) is dtype(False, True) is None


def test_the_documentation_has_every_flag_with_its_value() -> None:
    rows = {
        cells[1].strip(" `"): cells[2] for line in DEPLOY.read_text().splitlines() if (cells := line.split("|"))[2:]
    }
    for flag, values in engine_flags(rank=64, modules=["down_proj"], is_small=True, has_gpu=False).items():
        if flag != "--enable-lora":
            assert values[0] in rows[flag], flag
    assert rows["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"].strip() == str(KEEP_ALIVE_SECONDS)
