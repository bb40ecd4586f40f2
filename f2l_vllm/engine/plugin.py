"""Entry point `vllm.general_plugins`: what every vLLM process needs (API server, engine core and workers)."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from types import TracebackType

from f2l_vllm import logs
from f2l_vllm.base_models.registry import FAMILIES
from f2l_vllm.lifeline import end_with_server

logger = logging.getLogger(__name__)


def register() -> None:
    """Register what this package adds to vLLM. Light and idempotent: vLLM calls it in every process, in some twice."""
    end_with_server()
    if multiprocessing.parent_process() is None and "f2l_files" in os.environ.get("VLLM_PLUGINS", ""):
        sys.excepthook = _quiet_interrupt
    logs.adopt("transformers")
    register_models()
    register_adapter_tiers()


def register_models() -> None:
    """Replace vLLM's own base models by those with native video; a class is imported when a server needs it."""
    from vllm import ModelRegistry

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, family.vllm_class)


def register_adapter_tiers() -> None:
    """Keep adapters in host memory while they are needed, so that no step loads one; install the grammar patches."""
    from f2l_vllm.engine import grammar_patches, patches

    patches.install_residency()
    patches.install_worker_manager()
    grammar_patches.install()


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Log one line instead of a traceback: a stop before vLLM has started arrives as an exception."""
    if issubclass(kind, KeyboardInterrupt):
        logger.info("stopped before it was ready")
    else:
        sys.__excepthook__(kind, error, trace)
