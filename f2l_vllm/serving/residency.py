"""Which adapters an engine keeps in host memory, decided between its steps; for vLLM 0.32.

Stock vLLM loads an adapter that a step lacks inside the step, where a failure ends the engine, and drops the least
recently used one even if a request waits for it. Here a request reaches the scheduler with its adapter loaded already:
one that cannot be loaded fails its request and nothing else. An adapter that a request in the scheduler uses stays, and
so does one of ours (an id from `FIRST_ADAPTER_ID` up) until the API server, which knows who uses it, takes it out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

# Adapters that an operator names with `--lora-modules` count from 1; ours begin far above them. int32 in the engine.
FIRST_ADAPTER_ID = 1 << 20


class Residency:
    """The adapters in the host memory of one engine's workers. Used from the engine's loop only."""

    def __init__(self, executor: Any, requests: Mapping[str, Any], capacity: int) -> None:
        """`requests` are the scheduler's, by id; `capacity` is `--max-cpu-loras`."""
        self._executor = executor
        self._requests = requests
        self._capacity = capacity
        self._names: dict[int, str] = {}  # by adapter id, least recently asked for first
        self._pinned: set[int] = set()
        self._in_doubt = False

    def admit(self, request: LoRARequest) -> None:
        """Before a request of this adapter is scheduled: load it if it is not there.

        Raises:
            Exception: what the workers say when they cannot; nothing has changed then.
        """
        self._look_again()
        if self._names.get(request.lora_int_id) == request.lora_name and not request.load_inplace:
            self._names[request.lora_int_id] = self._names.pop(request.lora_int_id)
            self._trim(request.lora_int_id)
        else:
            self.add(request)

    def add(self, request: LoRARequest) -> bool:
        """Load an adapter into host memory. Raises as `admit`."""
        self._look_again()
        adapter_id, name = request.lora_int_id, request.lora_name
        if self._names.get(adapter_id) == name and not request.load_inplace:
            return True
        # Workers go by id and a batch by name: one id with two names would answer from the wrong adapter, and one name
        # with two ids would end the engine.
        for other in [i for i, n in self._names.items() if (i == adapter_id) != (n == name)]:
            if not self.remove(other):
                raise ValueError(f"adapter {name!r} has the name or the id of another one in use: ask again later")
        try:
            self._executor.add_lora(request)
        except BaseException:
            if adapter_id not in self._names:
                self._executor.remove_lora(adapter_id)  # of several workers some may have succeeded
            raise
        self._names[adapter_id] = name
        self._trim(adapter_id)
        return True

    def remove(self, adapter_id: int) -> bool:
        """Drop an adapter; False if a request still uses it, and then it stays."""
        if adapter_id in self._used():
            return False
        self._executor.remove_lora(adapter_id)
        self._names.pop(adapter_id, None)
        self._pinned.discard(adapter_id)
        return True

    def pin(self, adapter_id: int) -> bool:
        """Keep an adapter, in host memory and in its slot, until it is removed."""
        pinned: bool = self._executor.pin_lora(adapter_id)
        self._pinned.add(adapter_id)
        return pinned

    def doubt(self) -> None:
        """Something may have dropped adapters in the workers (new base weights, a debugging call): ask them again."""
        self._in_doubt = True

    def _look_again(self) -> None:
        if self._in_doubt:
            present = self._executor.list_loras()
            self._names = {adapter_id: name for adapter_id, name in self._names.items() if adapter_id in present}
            self._in_doubt = False

    def _used(self) -> set[int]:
        requests = [request for request in self._requests.values() if not request.is_finished()]
        return {request.lora_request.lora_int_id for request in requests if request.lora_request is not None}

    def _trim(self, asked: int) -> None:
        """Down to the capacity by dropping the operator's idle adapters, which a later request loads again."""
        if len(self._names) <= self._capacity:
            return
        kept = self._used() | self._pinned | {asked}
        idle = [i for i in self._names if i < FIRST_ADAPTER_ID and i not in kept]
        for adapter_id in idle[: len(self._names) - self._capacity]:
            self.remove(adapter_id)


def install() -> None:
    """Put a `Residency` between vLLM's engine core and its workers. Does nothing the second time."""
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
                    raise  # an engine in its caller's process: the caller gets it
                self._send_error_outputs_to_client([request.request_id], request.client_index)
                return
        stock_add_request(self, request, request_wave)

    # Arguments of the three below arrive as plain lists and are made into what the stock methods' annotations say.
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
