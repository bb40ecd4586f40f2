"""Entry point `vllm.general_plugins`: what every vLLM process needs, API server, engine core and workers alike."""

from __future__ import annotations


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
    from f2l_vllm.serving import compat, compat_grammars

    compat.install_residency()
    compat.install_worker_manager()
    compat_grammars.install()
