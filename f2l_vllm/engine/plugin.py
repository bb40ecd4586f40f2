"""Entry point `vllm.general_plugins`: what every vLLM process needs (API server, engine core and workers)."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from types import TracebackType

from f2l_vllm import logs
from f2l_vllm.base_models.registry import FAMILIES
from f2l_vllm.lifeline import end_with_spawner

logger = logging.getLogger(__name__)


def register() -> None:
    """Register what this package adds to vLLM. Light and idempotent: vLLM calls it in every process, in some twice."""
    register_lifeline()
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


def register_lifeline() -> None:
    """Make the engine and its workers end with the process that started them and, in a server, not before it: Ctrl-C in
    a terminal and a supervisor's SIGTERM may reach all processes at once, while answers are still being written."""
    end_with_spawner()
    if (
        "f2l_files" not in os.environ.get("VLLM_PLUGINS", "")
        or threading.current_thread() is not threading.main_thread()
    ):
        return
    if multiprocessing.parent_process() is None:
        sys.excepthook = _quiet_interrupt
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which their children would inherit


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Log one line instead of a traceback: a stop before vLLM has started arrives as an exception."""
    if issubclass(kind, KeyboardInterrupt):
        logger.info("stopped before it was ready")
    else:
        sys.__excepthook__(kind, error, trace)
