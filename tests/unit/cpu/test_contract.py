"""What `f2l_vllm.cpu` takes for granted in vLLM. A failure here says which of its modules to read again."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.lora.model_manager as model_manager
import vllm.v1.worker.cpu_worker as cpu_worker
import vllm.v1.worker.lora_model_runner_mixin as lora_model_runner_mixin
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.classifier import ClassificationHeadWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.attention import attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import cpu_unquantized_gemm, dispatch_cpu_unquantized_gemm
from vllm.platforms import builtin_platform_plugins
from vllm.platforms.cpu import CpuPlatform
from vllm.plugins import PLATFORM_PLUGINS_GROUP
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.block_table import BlockTable, ComputeSlotMappingKernel
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from f2l_vllm.cpu import ops
from f2l_vllm.cpu.attention import TorchAttentionImpl, TorchAttentionMetadataBuilder
from f2l_vllm.cpu.linear import plainly_loaded
from f2l_vllm.cpu.platform import TorchCpuPlatform
from f2l_vllm.cpu.punica import GroupedPunicaWrapper
from tests.support import source_of


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_plugin_finds_the_built_in_probes() -> None:
    assert {"cuda", "rocm", "xpu", "tpu", "cpu"} <= set(builtin_platform_plugins)
    assert PLATFORM_PLUGINS_GROUP == "vllm.platform_plugins"


def test_a_library_that_builds_gpu_kernels_when_imported_still_does_unless_it_is_told_not_to() -> None:
    assert importlib.util.find_spec("vllm.utils.humming") is not None
    count = """
import importlib, subprocess
built = []
class Built(subprocess.Popen):
    def __init__(self, command, **options):
        built.append("import humming" in command[-1])
        super().__init__(["true"], **options)
subprocess.Popen = Built
import humming.ops.utils, humming.utils.nvrtc
print(sum(built))
from f2l_vllm.cpu import plugin
plugin._prepare_process()
for module in (humming.ops.utils, humming.utils.nvrtc):
    importlib.reload(module)
print(sum(built))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HUMMING")}
    command = [sys.executable, "-c", count]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2"]  # none when they are imported again


def test_platform_overrides_methods_that_exist() -> None:
    for name in ("import_kernels", "register_triton_kernel_overrides", "get_punica_wrapper", "check_and_update_config"):
        assert parameters(getattr(TorchCpuPlatform, name)) == parameters(getattr(CpuPlatform, name))
    assert parameters(TorchCpuPlatform.get_attn_backend_cls) == parameters(CpuPlatform.get_attn_backend_cls)


def test_backend_can_judge_every_field_of_the_selector() -> None:
    judged = set(parameters(AttentionBackend.validate_configuration))
    assert judged - {"device_capability"} == set(AttentionSelectorConfig._fields)


def test_attention_is_called_with_the_arguments_it_takes() -> None:
    assert parameters(TorchAttentionImpl.forward) == parameters(AttentionImpl.forward)
    wanted = parameters(AttentionImpl.__init__)
    assert parameters(TorchAttentionImpl.__init__)[: len(wanted)] == wanted
    assert parameters(TorchAttentionMetadataBuilder.build) == parameters(AttentionMetadataBuilder.build)


def test_layers_hand_over_keys_and_values_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    layer = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=lambda *arguments: seen.extend(arguments)))
    monkeypatch.setattr(attention, "_resolve_layer_name", lambda name: name)
    monkeypatch.setattr(attention, "get_attention_context", lambda name: (None, layer, "cache", "slots"))
    key, value = torch.zeros(1), torch.ones(1)
    attention.unified_kv_cache_update(key, value, "layer")
    assert seen == [layer, key, value, "cache", "slots"]
    assert parameters(TorchAttentionImpl.do_kv_cache_update) == ["layer", "key", "value", "kv_cache", "slot_mapping"]


def test_batch_is_described_as_attention_reads_it() -> None:
    described = {field.name for field in fields(CommonAttentionMetadata)}
    assert {"query_start_loc", "seq_lens", "num_reqs", "block_table_tensor", "causal"} <= described


def test_kv_pages_are_token_major_in_the_layout_asked_for() -> None:
    layer, block, heads, tokens, content = range(5)
    assert KVCacheLayout.LBNHC.stride_order == (layer, block, tokens, heads, content)


def test_slot_mapping_kernel_is_replaced_and_called_by_name() -> None:
    override = KernelOverride(ComputeSlotMappingKernel.kernel, ops.SlotMappingOverride(ComputeSlotMappingKernel.kernel))
    assert override._forward_by_name
    assert "_COMPUTE_SLOT_MAPPING_KERNEL" in inspect.getsource(BlockTable.compute_slot_mapping)


def test_lora_wrapper_implements_what_layers_call() -> None:
    for name in PunicaWrapperBase.__abstractmethods__:
        given = inspect.signature(getattr(GroupedPunicaWrapper, name)).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in given.values())
        wanted = [name for name in parameters(getattr(PunicaWrapperBase, name)) if name != "kwargs"]
        assert [name for name in wanted if name not in given] == []
        assert takes_any or name == "apply_lora_full_linear"
    for name in ("_update_base_metadata", "token_lora_indices", "sampler_indices", "_select_full_linear_output"):
        assert hasattr(PunicaWrapperBase, name)


def test_slots_are_filled_where_adapters_are_packed() -> None:
    assert "LRUCacheWorkerLoRAManager(" in inspect.getsource(LoRAModelRunnerMixin.load_lora_model)
    assert hasattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager")
    assert "lora_manager_cls=self._manager_cls" in inspect.getsource(LRUCacheWorkerLoRAManager.create_lora_manager)
    # Nobody else writes to a slot, and only an adapter that was not active is written.
    assert inspect.getsource(model_manager).count(".set_lora(") == 1
    assert "set_lora(" in inspect.getsource(LoRAModelManager.activate_adapter)
    assert "if lora_id in self._active_adapters:\n            return False" in inspect.getsource(
        LoRAModelManager.activate_adapter
    )
    # The layers whose slots are packed read them through this one operation.
    assert "add_lora_linear(" in inspect.getsource(BaseLinearLayerWithLoRA._apply_lora_to_output)
    assert "add_lora_logits(" in inspect.getsource(ClassificationHeadWithLoRA._apply_lora_to_output)


def test_linear_layers_compute_what_they_were_given_when_loaded() -> None:
    layer = SimpleNamespace(cpu_linear=lambda x, weight, bias: (x, weight, bias))
    assert cpu_unquantized_gemm(layer, "x", "weight", "bias") == ("x", "weight", "bias")
    assert "dispatch_cpu_unquantized_gemm(layer" in inspect.getsource(
        UnquantizedLinearMethod.process_weights_after_loading
    )
    assert "load_lora_model" in inspect.getsource(CPUModelRunner.load_model)
    for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"):
        assert hasattr(torch.ops.mkldnn, name)


def test_weights_of_bf16_are_loaded_on_a_processor_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    layer = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    with pytest.raises(AttributeError, match="convert_weight_packed"):
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    with plainly_loaded():
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    assert torch.equal(cpu_unquantized_gemm(layer, x, layer.weight, None), layer(x))


def test_worker_names_its_runner_in_its_module() -> None:
    assert cpu_worker.CPUModelRunner is CPUModelRunner
    assert "CPUModelRunner(self.vllm_config" in inspect.getsource(cpu_worker.CPUWorker.init_device)


def test_runner_rewinds_generators_in_the_step_that_hides_them() -> None:
    assert "set_offset" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert source_of(GPUModelRunner).count("set_offset") == 1
    assert "sampling_metadata" in inspect.getsource(GPUModelRunner._sample)
    # Hiding works because sampling sees the batch's own dictionary, not a copy.
    assert "generators=self.generators" in inspect.getsource(InputBatch._make_sampling_metadata)
