"""Searches launch configurations of vLLM's LoRA kernels: from vLLM's default, one value after another is changed while
that is faster. What measures is given; `KernelTimer` does it on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from f2l_vllm.engine import tuned
from f2l_vllm.engine.tuned import Config, Product

Time = Callable[[str, int, Config], float]  # operation, rows, configuration -> milliseconds; infinite: it cannot run
_BETTER = 0.98  # of the time before; less is noise
_CHECKED, _ROUNDING = 64, 0.02  # rows whose result is compared with torch's, and how far it may be, of its norm
_TIMES_THE_CACHE = 2  # so large are the weights of all layers, of which steps use more than a half
_VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "shrink": {
        "split_k": (1, 2, 4, 8, 16, 32, 64),
        "block_k": (32, 64, 128, 256),
        "block_n": (16, 32, 64, 128),
        "block_m": (16, 32, 64),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    "expand": {
        "block_n": (32, 64, 128, 256),
        "block_m": (16, 32, 64, 128),
        "block_k": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
    },
}


def default(operation: str, rows: int) -> Config:
    """vLLM's own, which it takes without files (`get_lora_op_configs`)."""
    few = rows < 128
    if operation == "shrink":
        own: Config = {"block_m": 32, "block_n": 16, "block_k": 256 if few else 32, "split_k": 64 if few else 8}
        return {**own, "num_warps": 4, "num_ctas": 1, "group_size_m": 8, "num_stages": 2, "max_nreg": None}
    own = {"block_m": 64, "block_n": 128, "block_k": 32}
    return {**own, "num_warps": 4, "num_ctas": 1, "num_stages": 2, "max_nreg": None}


def blocks(operation: str, rows: int, product: Product, config: Config) -> int:
    """Thread blocks of one launch, of which those of slots without rows end at once."""
    _, n = product.sizes(operation)
    m, by_n = (-(-size // int(config[name] or 1)) for size, name in ((rows, "block_m"), (n, "block_n")))
    return m * by_n * int(config.get("split_k") or 1) * (product.slots + 1)


def search(operation: str, rows: int, time: Time) -> tuple[Config, float, float]:
    """The fastest configuration found, its milliseconds, and those of vLLM's default.

    Raises:
        RuntimeError: vLLM's default itself cannot run.
    """
    best = default(operation, rows)
    fastest = before = time(operation, rows, best)
    if not math.isfinite(before):
        raise RuntimeError(f"vLLM's {operation} kernel does not run here with {rows} rows and its own configuration")
    changed = True
    while changed:
        changed = False
        for name, values in _VALUES[operation].items():
            for value in values:
                if value == best[name]:
                    continue
                tried = {**best, name: value}
                if (took := time(operation, rows, tried)) < fastest * _BETTER:
                    best, fastest, changed = tried, took, True
    return best, fastest, before


def tune(
    folder: Path,
    gpu: str,
    wanted: Iterable[Product],
    say: Callable[[str], None],
    timer: Callable[[Product], Time] | None = None,
) -> None:
    """Search for each product, and write what is found.

    Args:
        folder: of the files.
        gpu: its name, by which vLLM finds them.
        say: told what each kernel took before and after.
        timer: makes what measures a product; None: vLLM's kernels on this GPU.
    """
    for product in wanted:
        time = (timer or KernelTimer)(product)
        for operation in tuned.OPERATIONS:
            chosen = {}
            for rows in tuned.ROWS:
                config, after, before = search(operation, rows, time)
                chosen[rows] = config
                launched = blocks(operation, rows, product, config)
                usual = blocks(operation, rows, product, default(operation, rows))
                say(
                    f"{operation}, {rows} rows: {before * 1e3:.1f} to {after * 1e3:.1f} µs, {usual:,} to {launched:,} "
                    "blocks"
                )
            tuned.write(folder, gpu, operation, product, chosen)


class KernelTimer:
    """Times vLLM's kernels for one product on this GPU, in a CUDA graph, as decode steps run.

    Every row of a step has an adapter of its own, as far as there are slots. A decode step goes through all layers, and
    finds none of a layer's adapters in the GPU's L2 cache. So each launch takes the adapters of other slots or of
    another layer than those before, until they are more than the cache holds. A configuration whose result differs from
    torch's, or that Triton cannot compile or launch, takes for ever.

    Args:
        product: what is multiplied.
        device, bench: where, and what times a function, in milliseconds; None: Triton, by replaying a CUDA graph.
        cache_bytes: of the L2 cache; None: the device's.
    """

    def __init__(
        self,
        product: Product,
        device: str = "cuda",
        bench: Callable[[Callable[[], None]], float] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._device, self._bench = device, bench or _in_a_graph
        self._product = product
        made = torch.Generator(device).manual_seed(0)
        cache = torch.cuda.get_device_properties(device).L2_cache_size if cache_bytes is None else cache_bytes

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=made) / shape[-1] ** 0.5

        def layers(*shape: int) -> list[torch.Tensor]:
            return [random(*shape) for _ in range(_TIMES_THE_CACHE * cache // (2 * math.prod(shape)) + 1)]

        self._a_S1RI = layers(product.slots, 1, product.rank, product.d_in)
        self._b_S1OR = layers(product.slots, 1, product.d_out, product.rank)
        self._random = random

    @torch.inference_mode()
    def __call__(self, operation: str, rows: int, config: Config) -> float:
        """Milliseconds of one launch."""
        from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

        steps = self._steps(rows)
        some = steps[0][0][:_CHECKED].long()
        module: Any
        if operation == "shrink":
            module, x_MI = lora_shrink_op, self._random(rows, self._product.d_in)
            out = torch.zeros(1, rows, self._product.rank, device=self._device)
            expected = torch.einsum("mi,mri->mr", x_MI[: len(some)].float(), self._a_S1RI[0][some, 0].float())
            launches = [
                partial(module._lora_shrink, x_MI, [a_S1RI], out, *step, 1.0)
                for a_S1RI in self._a_S1RI
                for step in steps
            ]
        else:
            module, x_1MR = lora_expand_op, self._random(1, rows, self._product.rank).float()
            out = torch.zeros(1, rows, self._product.d_out, device=self._device, dtype=torch.bfloat16)
            expected = torch.einsum("mr,mor->mo", x_1MR[0, : len(some)], self._b_S1OR[0][some, 0].float())
            launches = [
                partial(module._lora_expand, x_1MR, [b_S1OR], out[0], *step, 0, True)
                for b_S1OR in self._b_S1OR
                for step in steps
            ]

        def all_layers() -> None:
            for launch in launches:
                launch()

        own = module.get_lora_op_configs
        module.get_lora_op_configs = lambda *_, **__: config
        try:
            launches[0]()
            if not (out[0, : len(some)].float() - expected).norm() < _ROUNDING * expected.norm():
                return math.inf
            return self._bench(all_layers) / len(launches)
        except Exception:  # Triton raises many kinds: too much shared memory, no such instruction
            return math.inf
        finally:
            module.get_lora_op_configs = own

    def _steps(self, rows: int) -> list[tuple[torch.Tensor, ...]]:
        """What the kernels must know of steps of so many rows, each with its own slots; of one, if that takes all."""
        from vllm.lora.ops.triton_ops import LoRAKernelMeta

        slots = self._product.slots
        found: list[tuple[torch.Tensor, ...]] = []
        for first in range(max(1, slots // rows)):
            meta = LoRAKernelMeta.make(slots, rows, self._device)
            meta.prepare_tensors((torch.arange(rows, device=self._device) + first * rows) % slots)
            found.append(meta.meta_args(rows, False))
        return found


def _in_a_graph(call: Callable[[], None]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=20, return_mode="median"))
