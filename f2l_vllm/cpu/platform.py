"""The platform: vLLM's CPU platform without its compiled extension."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from vllm.platforms.cpu import CpuPlatform

from f2l_vllm.cpu import ops, plugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KV_BYTES_VARIABLE = "F2L_CPU_KV_BYTES"
_DEFAULT_KV_BYTES = 1 << 30
_DEFAULT_BLOCK_SIZE = 32  # tokens; prefix caching shares whole blocks, and questions are short


class TorchCpuPlatform(CpuPlatform):
    """vLLM's CPU platform, with kernels in PyTorch. It stays `PlatformEnum.CPU`, so vLLM's CPU worker is reused.

    Environment: `F2L_CPU_KV_BYTES`, size of the KV cache in bytes if `--kv-cache-memory-bytes` is not given.
    """

    def __init__(self) -> None:
        plugin.check_mode()
        super().__init__()

    # vLLM compiles some functions at their first use, e.g. at the first request for logprobs, and every other request
    # would wait for that.
    simple_compile_backend = "eager"

    @classmethod
    def import_kernels(cls) -> None:
        ops.install()

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        # Only the kernel that serving needs. The inherited fallback calls the compiled operator with another version's
        # arguments, and the other overrides are for speculative decoding and Mamba.
        from vllm.triton_utils.dispatcher import register_kernels
        from vllm.v1.worker.block_table import ComputeSlotMappingKernel

        name = "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel"
        register_kernels({name: ops.SlotMappingOverride(ComputeSlotMappingKernel.kernel)})

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Path of the attention backend.

        Raises:
            NotImplementedError: the layer needs more than causal decoder attention; the message names it.
        """
        from f2l_vllm.cpu.attention import TorchAttentionBackend

        reasons = TorchAttentionBackend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise NotImplementedError(
                f"f2l-vllm's CPU platform cannot serve this model: {'; '.join(reasons)}. "
                "It serves plain causal decoders; use a machine with an accelerator for this one."
            )
        return f"{TorchAttentionBackend.__module__}.{TorchAttentionBackend.__qualname__}"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "f2l_vllm.cpu.punica.GroupedPunicaWrapper"

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Apply the CPU settings to `vllm_config`.

        Raises:
            ValueError: `F2L_CPU_KV_BYTES` is not a positive number of bytes, or the V2 model runner is asked for.
            RuntimeError: `lscpu`, with which vLLM reads the CPU's layout, is not installed.
        """
        from vllm.config import CompilationMode

        if shutil.which("lscpu") is None:
            raise RuntimeError("vLLM's CPU worker needs the program lscpu: install the package util-linux.")
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        executor, preload = parallel.distributed_executor_backend, os.environ.get("LD_PRELOAD")
        method = os.environ.get(plugin.METHOD_VARIABLE)
        if parallel.worker_cls == "auto":
            parallel.worker_cls = "f2l_vllm.cpu.worker.TorchCPUWorker"

        super().check_and_update_config(vllm_config)

        if not cache.user_specified_block_size:
            cache.block_size = _DEFAULT_BLOCK_SIZE
            cache.user_specified_block_size = True  # or vLLM 0.33 chooses again, for attention that needs 128 tokens
        # The inherited method binds OpenMP threads, and for that wants a worker process per engine and its own libgomp
        # preloaded. Here nothing is bound, so the worker runs inside the engine and the environment stays as it is.
        if parallel.world_size == 1 and executor in (None, "uni"):
            parallel.distributed_executor_backend = "uni"
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload
        if method == "fork":  # a launcher's or an operator's word
            os.environ[plugin.METHOD_VARIABLE] = method
        # Fused layers call the compiled extension; "none" selects their PyTorch form. torch.compile's gain is not worth
        # its minutes and gigabytes at every start, and vLLM itself turns it off for LoRA on a CPU.
        vllm_config.compilation_config.custom_ops = ["none"]
        vllm_config.compilation_config.mode = CompilationMode.NONE
        if cache.kv_cache_memory_bytes is None:
            cache.kv_cache_memory_bytes = _kv_bytes()
        if vllm_config.use_v2_model_runner:
            raise ValueError("The V2 model runner needs Triton, which has no CPU: unset VLLM_USE_V2_MODEL_RUNNER.")


def _kv_bytes() -> int:
    text = os.environ.get(KV_BYTES_VARIABLE)
    if text is None:
        return _DEFAULT_KV_BYTES
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{KV_BYTES_VARIABLE}={text!r} is not valid: give a positive number of bytes.")
    return int(text)
