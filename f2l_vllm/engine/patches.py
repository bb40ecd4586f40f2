"""Changes vLLM in the engine's processes: `Residency` decides which adapters are in host memory.

`tests/unit/engine/test_patches.py` holds a contract test for each patched place.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from f2l_vllm.engine.residency import Residency

logger = logging.getLogger(__name__)


def install_residency() -> None:
    """Put a `Residency` between vLLM's engine core and its workers. Idempotent.

    Every request enters through `EngineCore.add_request`. The other methods replaced here add, remove and pin adapters,
    or may drop them in the workers.
    """
    from vllm.v1.engine import core

    EngineCore: Any = core.EngineCore
    if hasattr(EngineCore, "_f2l_residency"):
        return
    EngineCore._f2l_residency = None
    stock_add_request, stock_collective_rpc = EngineCore.add_request, EngineCore.collective_rpc

    @functools.wraps(EngineCore.add_request)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> None:
        if request.lora_request is not None:
            try:
                _residency(self).admit(request.lora_request)
            except Exception as error:
                name = request.lora_request.lora_name
                logger.error("request %s failed: adapter %s cannot be loaded: %s", request.request_id, name, error)
                if not isinstance(self, core.EngineCoreProc):
                    raise  # the engine runs in its caller's process: the caller gets the error
                self._send_error_outputs_to_client([request.request_id], request.client_index)
                return
        stock_add_request(self, request, request_wave)

    # vLLM converts the arguments of the three methods below from plain lists, by the stock methods' annotations.
    @functools.wraps(EngineCore.add_lora)
    def add_lora(self: Any, lora_request: Any) -> bool:
        return _residency(self).add(lora_request)

    @functools.wraps(EngineCore.remove_lora)
    def remove_lora(self: Any, lora_id: int) -> bool:
        return _residency(self).remove(lora_id)

    @functools.wraps(EngineCore.pin_lora)
    def pin_lora(self: Any, lora_id: int) -> bool:
        return _residency(self).pin(lora_id)

    @functools.wraps(EngineCore.collective_rpc)
    def collective_rpc(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "scheduler"):  # else the engine is being made and has no adapters yet
            _residency(self).doubt()
        return stock_collective_rpc(self, *args, **kwargs)

    for method in (add_request, add_lora, remove_lora, pin_lora, collective_rpc):
        setattr(EngineCore, method.__name__, method)


def _residency(engine: Any) -> Residency:
    if engine._f2l_residency is None:
        config = engine.vllm_config.lora_config
        capacity = 0 if config is None else config.max_cpu_loras or config.max_loras
        engine._f2l_residency = Residency(engine.model_executor, engine.scheduler.requests, capacity)
    residency: Residency = engine._f2l_residency
    return residency


def install_worker_manager() -> None:
    """Make vLLM's model runners use `HostTierLoRAManager` and, on CUDA, `lora_metadata`. The replacement waits until a
    worker is made, because importing its modules would delay the API server's start by seconds. Idempotent."""
    from vllm.v1.worker import worker_base

    wrapper: Any = worker_base.WorkerWrapperBase
    stock = wrapper.init_device
    if stock.__module__ == __name__:
        return

    def init_device(self: Any) -> None:
        from vllm.platforms import current_platform
        from vllm.v1.worker import lora_model_runner_mixin

        from f2l_vllm.engine import lora_metadata
        from f2l_vllm.engine.lora_manager import HostTierLoRAManager

        runners: Any = lora_model_runner_mixin
        runners.LRUCacheWorkerLoRAManager = HostTierLoRAManager
        if current_platform.is_cuda():
            lora_metadata.install()
        stock(self)

    wrapper.init_device = init_device
