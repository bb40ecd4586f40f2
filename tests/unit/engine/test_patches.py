"""Contracts with vLLM: what `engine/patches.py` and `engine/lora_manager.py` lean on in the engine."""

import inspect
from inspect import signature
from types import SimpleNamespace

import pytest
from vllm.lora.model_manager import AdapterLRUCache, LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
from vllm.v1.executor.abstract import Executor
from vllm.v1.request import Request
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.worker_base import WorkerWrapperBase

from f2l_vllm.engine import lora_metadata, patches, plugin
from f2l_vllm.engine.residency import FIRST_ADAPTER_ID
from f2l_vllm.server import vllm_api
from tests.support import module_source, source_of


def test_the_plugin_is_in_front_of_the_engine_once():
    plugin.register()
    first = EngineCore.add_request, EngineCore.add_lora, EngineCore.remove_lora, WorkerWrapperBase.init_device
    plugin.register()
    assert first == (EngineCore.add_request, EngineCore.add_lora, EngineCore.remove_lora, WorkerWrapperBase.init_device)
    assert {method.__code__.co_filename.rsplit("/", 2)[-2] for method in first} == {"engine"}


def test_every_request_enters_through_add_request():
    assert "self.add_request(req, request_wave)" in inspect.getsource(EngineCoreProc._handle_client_request)
    assert "super().add_request(request, request_wave)" in inspect.getsource(DPEngineCoreProc.add_request)
    assert "add_request" not in vars(EngineCoreProc)
    for name in ("add_lora", "remove_lora", "pin_lora", "collective_rpc"):
        assert name not in vars(EngineCoreProc)
    assert "getattr(self, method_name)" in inspect.getsource(EngineCoreProc._handle_client_request)


def test_workers_are_called_before_there_is_a_scheduler():
    """`--max-model-len auto` tells them a shorter length while the engine is made."""
    source = inspect.getsource(EngineCore._initialize_kv_caches)
    assert 'self.collective_rpc("update_max_model_len"' in source
    init = inspect.getsource(EngineCore.__init__)
    assert init.index("self._initialize_kv_caches(") < init.index("self.scheduler:")
    plugin.register()
    engine = EngineCore.__new__(EngineCore)
    engine.model_executor = SimpleNamespace(collective_rpc=lambda *call: call)
    assert engine.collective_rpc("update_max_model_len", args=(64,)) == ("update_max_model_len", None, (64,), None)


def test_what_crosses_to_the_engine_is_made_into_what_annotations_say():
    assert "signature(method).parameters" in inspect.getsource(EngineCoreProc._convert_msgspec_args)
    assert signature(EngineCore.add_lora).parameters["lora_request"].annotation is LoRARequest


def test_an_engine_can_fail_one_request():
    assert list(inspect.signature(EngineCoreProc._send_error_outputs_to_client).parameters) == [
        "self",
        "req_ids",
        "client_index",
    ]
    assert "FinishReason.ERROR" in inspect.getsource(EngineCoreProc._send_error_outputs_to_client)


def test_the_scheduler_holds_requests_by_id_with_their_adapters():
    assert "self.requests: dict[str, Request]" in inspect.getsource(Scheduler.__init__)
    assert "self.lora_request = lora_request" in inspect.getsource(Request.__init__)
    assert callable(Request.is_finished)


@pytest.mark.parametrize(
    ("name", "argument"), [("add_lora", "lora_request"), ("remove_lora", "lora_id"), ("pin_lora", "lora_id")]
)
def test_executors_reach_the_workers_adapters(name, argument):
    assert list(inspect.signature(getattr(Executor, name)).parameters) == ["self", argument]


def test_what_drops_adapters_in_workers_comes_by_collective_rpc():
    """New base weights do; `Residency.doubt` covers them."""
    assert "remove_all_adapters" in inspect.getsource(lora_model_runner_mixin.LoRAModelRunnerMixin.reset_lora_state)
    assert "reset_lora_state" not in source_of(EngineCore)


def test_model_runners_take_their_manager_by_this_name_after_a_worker_is_initialized():
    source = inspect.getsource(lora_model_runner_mixin.LoRAModelRunnerMixin.load_lora_model)
    assert "self.lora_manager = LRUCacheWorkerLoRAManager(" in source
    assert "load_general_plugins()" in inspect.getsource(WorkerWrapperBase.init_worker)


def test_a_step_applies_adapters_and_then_their_mapping():
    source = inspect.getsource(WorkerLoRAManager.set_active_adapters)
    assert source.index("self._apply_adapters(requests)") < source.index("set_adapter_mapping(mapping)")
    assert "set_active_adapters" not in vars(LRUCacheWorkerLoRAManager)


def test_the_model_managers_tiers_are_two_caches():
    source = inspect.getsource(LoRAModelManager.__init__)
    assert "self._registered_adapters: AdapterLRUCache[LoRAModel] = AdapterLRUCache(" in source
    assert "self._active_adapters: AdapterLRUCache[None] = AdapterLRUCache(" in source
    assert "self.packed_modules: dict[str, list[str]]" in source
    assert "self.modules: dict[str, BaseLayerWithLoRA]" in source
    assert "remove_oldest" in inspect.getsource(LRUCacheLoRAModelManager.activate_adapter)  # a slot, not a place


def test_a_cache_without_an_end_drops_nothing():
    dropped = []
    cache = AdapterLRUCache(float("inf"), dropped.append)
    for key in range(10_000):
        cache[key] = None
    assert len(cache) == 10_000
    assert dropped == []
    cache.pop(7)
    assert dropped == [7]


def test_a_batch_finds_adapters_by_name_and_rows_by_id():
    """So one name with two ids in a batch leaves a row without its adapter: `Residency` refuses the second."""
    assert "set(\n            self.lora_id_to_lora_request.values()" in inspect.getsource(InputBatch.make_lora_inputs)
    twins = {vllm_api.new_lora_request("f2l-x", number, "/adapters/f2l-x", "base") for number in (1, 2)}
    assert len(twins) == 1


def test_ids_fit_the_engines_int32():
    assert 1 << 20 <= FIRST_ADAPTER_ID < 1 << 30


@pytest.mark.parametrize("on_cuda", [True, False])
def test_the_metadata_of_adapters_is_ours_where_vllm_runs_on_cuda(monkeypatch, on_cuda):
    installed = []
    monkeypatch.setattr(WorkerWrapperBase, "init_device", lambda self: installed.append("device"))
    monkeypatch.setattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", None)
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda=lambda: on_cuda))
    monkeypatch.setattr(lora_metadata, "install", lambda: installed.append("metadata"))
    patches.install_worker_manager()
    WorkerWrapperBase.init_device(None)
    assert installed == ["metadata"] * on_cuda + ["device"]
    assert '"vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"' in module_source("vllm.platforms.cuda")
