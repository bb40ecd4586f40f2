"""Entry point `vllm.general_plugins`: what every vLLM process needs, API server, engine core and workers alike."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Register what this package adds to vLLM. Light and idempotent: vLLM calls it in every process, some twice."""
    register_models()
    register_adapter_tiers()


def register_models() -> None:
    """Put SmolVLM with native video in the place of vLLM's own; the class is imported when a server needs it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(
        "SmolVLMForConditionalGeneration", "f2l_vllm.serving.smolvlm_video:SmolVLMVideoForConditionalGeneration"
    )


def register_adapter_tiers() -> None:
    """Adapters stay in host memory while somebody needs them, and no step loads one."""
    from f2l_vllm.serving import residency

    residency.install()
    install_worker_manager()


def install_worker_manager() -> None:
    """Have vLLM's model runners use `HostTierLoRAManager`. Put in place when a worker is made, because the modules it
    needs would cost the API server's start seconds. Does nothing the second time."""
    from vllm.v1.worker import worker_base

    wrapper: Any = worker_base.WorkerWrapperBase
    stock = wrapper.init_device
    if stock.__module__ == __name__:
        return

    def init_device(self: Any) -> None:
        from vllm.v1.worker import lora_model_runner_mixin

        from f2l_vllm.serving.worker_manager import HostTierLoRAManager

        runners: Any = lora_model_runner_mixin
        runners.LRUCacheWorkerLoRAManager = HostTierLoRAManager
        stock(self)

    wrapper.init_device = init_device
