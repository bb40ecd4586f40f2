"""Worker and model runner: vLLM's own for the CPU, with packed weights, compact adapters, and per-request random
generators that work on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.v1.worker.cpu_worker as cpu_worker
import vllm.v1.worker.lora_model_runner_mixin as lora_model_runner_mixin
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from f2l_vllm.cpu.linear import pack_linears, plainly_loaded
from f2l_vllm.cpu.lora_slots import CompactLoRAModelManager
from f2l_vllm.cpu.plugin import METHOD_VARIABLE
from f2l_vllm.lifeline import end_with_server


class TorchCPUModelRunner(CPUModelRunner):
    """Packs linear layers and adapters, and does not advance the generator of a seeded request while only a part of its
    prompt has been read.

    vLLM's runner samples for every row, drops the draw of such a request, and rewinds its generator by `set_offset`,
    which CPU generators do not have. Here the generator is hidden from both steps and never advanced.
    """

    def load_model(self, load_dummy_weights: bool = False) -> None:
        with plainly_loaded():
            super().load_model(load_dummy_weights)
        pack_linears(self.model)

    def load_lora_model(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM's mixin names its manager's class, which names the class of the slots' manager: replace the latter.
        holder = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
        original = holder._manager_cls
        holder._manager_cls = CompactLoRAModelManager
        try:
            return super().load_lora_model(*args, **kwargs)
        finally:
            holder._manager_cls = original

    @contextmanager
    def _partial_prefills_unseeded(self) -> Iterator[None]:
        generators: dict[int, torch.Generator] = self.input_batch.generators
        dropped = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        hidden = {row: generators.pop(row) for row in dropped if row in generators}
        try:
            yield
        finally:
            generators.update(hidden)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        with self._partial_prefills_unseeded():
            return super()._sample(*args, **kwargs)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        with self._partial_prefills_unseeded():
            return super()._bookkeeping_sync(*args, **kwargs)


class TorchCPUWorker(cpu_worker.CPUWorker):
    """vLLM's CPU worker with `TorchCPUModelRunner`."""

    def init_device(self) -> None:
        if os.environ.get(METHOD_VARIABLE) == "fork":
            end_with_server()  # vLLM's plugins, which do this in other engines, are loaded in its parent only
        # The worker takes its runner's class from its module and offers no other way to choose it.
        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = TorchCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
            # The name of this engine's shared memory is only read while its process groups are made. If it stayed, a
            # process that holds an engine would pass it to every server it starts, and their vLLM would warn of it.
            os.environ.pop("VLLM_DIST_IDENT", None)
