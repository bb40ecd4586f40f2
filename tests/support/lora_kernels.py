"""Runs vLLM's LoRA kernels on a CPU, by Triton's interpreter, with our metadata: `python -m tests.support.lora_kernels`
in the environment `ENVIRONMENT` writes JSON to standard output."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

# The interpreter has to be chosen before Triton is imported. vLLM leaves Triton out where there is no GPU, unless this
# variable is empty; our platform plugin sets it. The interpreter multiplies bf16 wrongly, so the numbers are fp16.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
SLOT_OF = {13: 0, 11: 1, 12: 2}  # of each adapter's id; the fourth slot is empty
SLOTS, RANK, D_IN, D_OUT = 4, 16, 80, 48

Request = tuple[int, int]  # an adapter's id, 0 for none, and how many tokens
STEPS: dict[str, list[Request]] = {
    "prefill": [(11, 3), (0, 2), (13, 1), (11, 4), (12, 2)],
    "no adapter": [(0, 2), (0, 1)],
    "decode": [(0, 1), (12, 1), (13, 1), (0, 1), (12, 1)],
    "one adapter": [(11, 2)],
}
BESIDE_BASE_ROWS: list[Request] = [(13, 1), (11, 1), (0, 1)]  # in the order of their slots


class Layer:
    """A linear with adapters in its slots, as vLLM's LoRA layers call the kernels."""

    def __init__(self, wrapper: Any) -> None:
        import torch

        self.wrapper = wrapper
        self.random = torch.Generator().manual_seed(0)
        self.a_S1RI = self._normal(SLOTS, 1, RANK, D_IN) / D_IN**0.5
        self.b_S1OR = self._normal(SLOTS, 1, D_OUT, RANK) / RANK**0.5

    def step(self, requests: Sequence[Request], layers: int | None = None) -> list[dict[str, float]]:
        """What the kernels make of each request: how far it is from its own product, and how far from none.

        Args:
            layers: of the launched grid, as a CUDA graph keeps them; None: as the metadata says.
        """
        self.prepare(requests)
        tokens = sum(length for _, length in requests)
        x_MI, base_MO = self._normal(tokens, D_IN), self._normal(tokens, D_OUT)
        out_MO = base_MO.clone()
        meta = self.wrapper.token_mapping_meta
        if layers is not None:
            meta.num_active_loras_cpu[0] = layers
        self.wrapper.add_lora_linear(out_MO, x_MI, (self.a_S1RI,), (self.b_S1OR,), 1.0, (D_OUT,))
        found, start = [], 0
        for adapter, length in requests:
            rows = slice(start, start + length)
            wanted = base_MO[rows].float()
            if adapter:
                a_RI, b_OR = self.a_S1RI[SLOT_OF[adapter], 0].float(), self.b_S1OR[SLOT_OF[adapter], 0].float()
                wanted = wanted + x_MI[rows].float() @ a_RI.T @ b_OR.T
            apart, moved = ((out_MO[rows].float() - other.float()).abs().max() for other in (wanted, base_MO[rows]))
            found.append({"adapter": adapter, "apart": float(apart), "moved": float(moved)})
            start += length
        return found

    def prepare(self, requests: Sequence[Request]) -> int:
        """Prepare the metadata of a step; the layers with which its kernels would be launched."""
        from vllm.lora.layers import LoRAMapping

        ids = tuple(adapter for adapter, _ in requests)
        tokens = tuple(adapter for adapter, length in requests for _ in range(length))
        in_slots = [*sorted(SLOT_OF, key=SLOT_OF.__getitem__), None]
        self.wrapper.update_metadata(LoRAMapping(tokens, ids, is_prefill=True), in_slots, SLOTS + 1, 100)
        return int(self.wrapper.token_mapping_meta.num_active_loras_cpu)

    def _normal(self, *shape: int) -> Any:
        import torch

        return torch.randn(*shape, generator=self.random).half()


def run() -> dict[str, Any]:
    """The steps of one layer; those of another, launched for the adapters of a step alone; and as a graph does it."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op
    from vllm.lora.punica_wrapper import punica_gpu

    from f2l_vllm.engine import lora_metadata

    # Where there is a GPU, vLLM registers them as operators for its memory alone.
    vars(punica_gpu).update(lora_shrink=lora_shrink_op._lora_shrink, lora_expand=lora_expand_op._lora_expand)
    lora_metadata.install()

    def layer(specialize: bool) -> Layer:
        config = Namespace(max_loras=SLOTS, specialize_active_lora=specialize)
        return Layer(punica_gpu.PunicaWrapperGPU(64, 8, "cpu", lora_config=config))

    all_slots, active = layer(specialize=False), layer(specialize=True)
    found: dict[str, Any] = {name: all_slots.step(requests) for name, requests in STEPS.items()}
    found["active"] = active.step(BESIDE_BASE_ROWS)
    # A graph is captured with as many adapters as it is for, and chosen by the number of a step's adapters.
    adapters = [request for request in BESIDE_BASE_ROWS if request[0]]
    found["captured"] = active.prepare(adapters)
    found["graph"] = active.step(BESIDE_BASE_ROWS, layers=found["captured"])
    return found


if __name__ == "__main__":
    json.dump(run(), sys.stdout)
