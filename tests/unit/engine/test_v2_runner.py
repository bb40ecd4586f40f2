"""Contracts with vLLM's V2 model runner, which it takes on CUDA. It needs Triton and runs on no CPU, but its objects
that say which row has which adapter do; they stand here before our manager of adapters."""

from __future__ import annotations

import inspect
import math
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import pytest
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import AdapterLRUCache
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper.utils import convert_mapping
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_captured_lora_counts
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.gpu import lora_utils
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from f2l_vllm.engine import patches
from f2l_vllm.engine.lora_manager import HostTierLoRAManager
from f2l_vllm.engine.residency import FIRST_ADAPTER_ID
from tests.support import module_source

SLOTS = 2
RUNNER = module_source("vllm.v1.worker.gpu.model_runner")


def request(number: int) -> LoRARequest:
    return LoRARequest(f"f2l-{number}", FIRST_ADAPTER_ID + number, f"/adapters/{number}")


class Runner(LoRAModelRunnerMixin):
    """The part of the V2 runner that stands between the batch and the adapters, over our manager of real caches."""

    def __init__(self, load: Callable[[LoRARequest], LoRAModel]) -> None:
        manager = HostTierLoRAManager.__new__(HostTierLoRAManager)
        vars(manager)["_load_adapter"] = load
        model = Namespace(lora_slots=SLOTS, lora_index_to_id=[None] * SLOTS, mapping=None)
        model.deactivate_adapter = lambda number: self._leave(model, number)
        model._registered_adapters = AdapterLRUCache(math.inf, model.deactivate_adapter)
        model._active_adapters = AdapterLRUCache(SLOTS, model.deactivate_adapter)
        model.add_adapter = lambda lora: model._registered_adapters.__setitem__(lora.id, lora)
        model.remove_adapter = lambda number: model._registered_adapters.pop(number, None)
        model.activate_adapter = lambda number: self._enter(model, number)
        model.set_adapter_mapping = lambda mapping: setattr(model, "mapping", mapping)
        manager._adapter_manager = model
        self.lora_manager, self.model = manager, model
        self.state = LoraState(max_num_reqs=4)

    @staticmethod
    def _enter(model: Namespace, number: int) -> None:
        if number in model._active_adapters:
            return
        if len(model._active_adapters) >= SLOTS:
            model._active_adapters.remove_oldest()
        model.lora_index_to_id[model.lora_index_to_id.index(None)] = number
        model._active_adapters[number] = None

    @staticmethod
    def _leave(model: Namespace, number: int) -> None:
        model.lora_index_to_id[model.lora_index_to_id.index(number)] = None

    def step(self, rows: dict[str, int], tokens: list[int]) -> list[int]:
        """One step, as `GPUModelRunner.execute_model` sets its adapters: the slot of every token, -1 for none."""
        mapping = self.state.make_lora_inputs(list(rows), np.array(list(rows.values())), np.array(tokens))
        self._set_active_loras(*mapping)
        slots, *_ = convert_mapping(self.model.mapping, self.model.lora_index_to_id, SLOTS, 512, torch.device("cpu"))
        return slots.tolist()


@pytest.fixture
def runner() -> Runner:
    return Runner(lambda lora_request: LoRAModel(lora_request.lora_int_id, 8, {}))


def test_the_v2_runner_is_reached_by_the_name_that_the_patch_replaces() -> None:
    assert "LoRAModelRunnerMixin" in RUNNER.split("class GPUModelRunner(")[1].split(":")[0]
    for name in ("load_lora_model", "_set_active_loras"):
        assert f"def {name}" not in RUNNER
    assert "self.load_lora_model(" in RUNNER
    assert LoRAModelRunnerMixin.load_lora_model.__globals__ is vars(lora_model_runner_mixin)
    assert "runners.LRUCacheWorkerLoRAManager = HostTierLoRAManager" in inspect.getsource(patches)


def test_the_v2_runner_sets_its_adapters_as_this_test_does() -> None:
    assert "lora_inputs = self.lora_state.make_lora_inputs(" in RUNNER
    assert "self._set_active_loras(*lora_inputs)" in RUNNER
    assert "self.lora_state.add_request(req_id, req_index, new_req_data.lora_request)" in RUNNER
    assert "self.lora_state.remove_request(req_id)" in RUNNER


def test_each_row_of_a_batch_gets_its_own_adapter(runner: Runner) -> None:
    runner.state.add_request("a", 0, request(1))
    runner.state.add_request("none", 1, None)
    runner.state.add_request("b", 2, request(2))
    slots = runner.step({"b": 2, "none": 1, "a": 0}, [3, 2, 1])
    index = runner.model.lora_index_to_id.index
    assert slots == [index(FIRST_ADAPTER_ID + 2)] * 3 + [-1] * 2 + [index(FIRST_ADAPTER_ID + 1)]
    assert slots[0] != slots[-1]


def test_a_row_that_is_used_again_forgets_its_adapter(runner: Runner) -> None:
    runner.state.add_request("a", 0, request(1))
    assert runner.step({"a": 0}, [2]) == [0, 0]
    runner.state.remove_request("a")
    runner.state.add_request("next", 0, None)
    assert runner.step({"next": 0}, [2]) == [-1, -1]
    runner.state.remove_request("next")
    runner.state.add_request("b", 0, request(2))
    assert runner.step({"b": 0}, [1]) == [runner.model.lora_index_to_id.index(FIRST_ADAPTER_ID + 2)]


def test_an_adapter_that_is_in_use_keeps_its_slot_while_others_come(runner: Runner) -> None:
    for number in range(4):
        runner.state.add_request(str(number), number, request(number))
    first = runner.step({"0": 0, "1": 1}, [1, 1])
    assert sorted(first) == [0, 1]
    assert runner.step({"1": 1, "2": 2}, [1, 1])[0] == first[1]
    assert runner.step({"3": 3, "1": 1}, [1, 1])[1] == first[1]


def test_ids_of_the_largest_size_fit(runner: Runner) -> None:
    last = LoRARequest("last", 2**31 - 1, "/adapters/last")
    runner.state.add_request("a", 0, last)
    assert runner.state.lora_ids[0] == last.lora_int_id
    assert runner.step({"a": 0}, [1]) == [0]


def test_a_batch_finds_adapters_by_name_and_rows_by_id() -> None:
    """So one name with two ids in a batch leaves a row without its adapter: `Residency` refuses the second."""
    state = LoraState(max_num_reqs=2)
    for row, number in enumerate((1, 2)):
        state.add_request(str(row), row, LoRARequest("f2l-x", number, "/adapters/x"))
    rows, _, requests = state.make_lora_inputs(["0", "1"], np.array([0, 1]), np.array([1, 1]))
    assert (len(set(rows)), len(requests)) == (2, 1)


def test_kernels_launched_for_the_active_adapters_lose_one_beside_base_rows() -> None:
    """Why `--specialize-active-lora` is refused. A CUDA graph is chosen by the number of adapters, and its LoRA kernels
    have as many layers; their list begins with -1 if there are base rows, so the last adapter has no layer left."""
    state = LoraState(max_num_reqs=3)
    for row, one in enumerate([request(1), request(2), None]):
        state.add_request(str(row), row, one)
    config = Namespace(max_loras=8, specialize_active_lora=True)
    graph = lora_utils.get_num_active_loras_for_dispatch(config, state, ["0", "1", "2"], dummy_run=False)
    captured = get_captured_lora_counts(8, specialize=True)
    assert graph in captured
    meta = LoRAKernelMeta.make(8, 16, torch.device("cpu"), captured)
    meta.prepare_tensors(torch.tensor([0, 1, -1]))
    assert meta.active_lora_ids[:graph].tolist() == [-1, 0]  # and not 1
    plain = Namespace(cudagraph_specialize_lora=False)
    assert lora_utils.get_lora_capture_cases(config, plain) == [0, config.max_loras + 1]
