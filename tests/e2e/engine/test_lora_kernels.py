"""vLLM's LoRA kernels, run on a CPU by Triton's interpreter, give each request its own adapter from our metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from f2l_vllm import vllm_versions
from tests.support import ROOT
from tests.support.lora_kernels import BESIDE_BASE_ROWS, ENVIRONMENT, STEPS

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; PyPI's vLLM brings it: pip install triton"
)
ROUNDING, MOVED = 0.02, 0.3  # of values of about 1 in fp16; what an adapter changes in the largest of 48 values


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.lora_kernels"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def own(request: dict[str, float]) -> bool:
    """Whether the request got what plain products with its adapter give, and nothing without one."""
    changed = request["moved"] > MOVED if request["adapter"] else request["moved"] == 0
    return request["apart"] < ROUNDING and changed


@pytest.mark.parametrize("step", STEPS)
def test_every_request_of_a_mixed_batch_gets_its_own_adapter(step: str, found: dict[str, Any]) -> None:
    assert [request["adapter"] for request in found[step]] == [adapter for adapter, _ in STEPS[step]]
    assert all(map(own, found[step])), found[step]


def test_a_cuda_graph_chosen_by_the_adapters_of_a_step_loses_the_last_of_them(found: dict[str, Any]) -> None:
    """Why `--specialize-active-lora` is refused; a version that answers all three may allow it. `test_v2_runner.py`
    shows that a graph is chosen so."""
    assert all(map(own, found["active"])), found["active"]  # launched for what is there, base rows counted
    assert found["captured"] == len([adapter for adapter, _ in BESIDE_BASE_ROWS if adapter])
    first, last, base = found["graph"]
    lost = f"vLLM {vllm_versions.installed()} launches LoRA kernels another way: see docs/patches.md"
    assert own(first), lost
    assert last["moved"] == 0, lost
    assert own(base), lost
