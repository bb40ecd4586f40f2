"""Decides between an engine's steps which adapters it keeps in host memory; `patches` puts it into vLLM's core.

Stock vLLM loads a missing adapter inside the step that needs it, where a failure ends the engine, and drops the least
recently used adapter even if a request waits for it. Here an adapter is loaded before its request reaches the
scheduler, so a failure to load fails only that request. An adapter stays while a request in the scheduler uses it. One
of our own (an id from `FIRST_ADAPTER_ID` up) stays until the API server, which knows who uses it, removes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# Ids of adapters that an operator names with `--lora-modules` count from 1; ours begin far above. int32 in the engine.
FIRST_ADAPTER_ID = 1 << 20


class Residency:
    """The adapters in the host memory of one engine's workers. Used from the engine's loop only."""

    def __init__(self, executor: Any, requests: Mapping[str, Any], capacity: int) -> None:
        """`requests` are the scheduler's, by id; `capacity` is `--max-cpu-loras`."""
        self._executor = executor
        self._requests = requests
        self._capacity = capacity
        self._names: dict[int, str] = {}  # adapter id -> name, least recently requested first
        self._pinned: set[int] = set()
        self._in_doubt = False

    def admit(self, request: LoRARequest) -> None:
        """Load the adapter of a request that is about to be scheduled, if it is not in host memory.

        Raises:
            Exception: the workers' error if they cannot load it; then nothing has changed.
        """
        self._look_again()
        if self._names.get(request.lora_int_id) == request.lora_name and not request.load_inplace:
            self._names[request.lora_int_id] = self._names.pop(request.lora_int_id)
            self._trim(request.lora_int_id)
        else:
            self.add(request)

    def add(self, request: LoRARequest) -> bool:
        """Load an adapter into host memory. Raises like `admit`."""
        self._look_again()
        adapter_id, name = request.lora_int_id, request.lora_name
        if self._names.get(adapter_id) == name and not request.load_inplace:
            return True
        # Workers identify adapters by id, a batch by name: one id with two names would answer from the wrong adapter,
        # and one name with two ids would end the engine.
        for other in [i for i, n in self._names.items() if (i == adapter_id) != (n == name)]:
            if not self.remove(other):
                raise ValueError(f"adapter {name!r} has the name or the id of another one in use: ask again later")
        try:
            self._executor.add_lora(request)
        except BaseException:
            if adapter_id not in self._names:
                self._executor.remove_lora(adapter_id)  # some of several workers may have succeeded
            raise
        self._names[adapter_id] = name
        self._trim(adapter_id)
        return True

    def remove(self, adapter_id: int) -> bool:
        """Drop an adapter; False, and the adapter stays, if a request still uses it."""
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
        """Ask the workers again later: something (new base weights, a debugging call) may have dropped adapters."""
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
        """Drop the operator's idle adapters down to the capacity; a later request loads them again."""
        if len(self._names) <= self._capacity:
            return
        kept = self._used() | self._pinned | {asked}
        idle = [i for i in self._names if i < FIRST_ADAPTER_ID and i not in kept]
        for adapter_id in idle[: len(self._names) - self._capacity]:
            self.remove(adapter_id)
