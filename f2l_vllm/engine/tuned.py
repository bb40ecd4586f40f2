"""Files with the launch configurations of vLLM's LoRA kernels for one GPU, as vLLM reads them from
`VLLM_TUNED_CONFIG_FOLDER` (`lora/ops/triton_ops/utils.py`; its README_TUNING.md).

A file holds `[slots + 1][slices][rows][k][n]`, all of them words: k and n are the two sizes of the product. vLLM takes
the nearest number where one is not there, but a number of slices that is missing ends the engine. Only linears that
vLLM does not merge with others, which have one slice, are tuned and served from these files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2l_vllm.files import write_whole

VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
OPERATIONS = ("shrink", "expand")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of a step; vLLM takes the nearest
_NOT_MERGED = {"down_proj", "o_proj"}
Config = dict[str, int | None]


@dataclass(frozen=True)
class Product:
    """What the kernels of one linear multiply: slots, the engine's rank, and the linear's sizes."""

    slots: int
    rank: int
    d_in: int
    d_out: int

    def sizes(self, operation: str) -> tuple[int, int]:
        """k and n."""
        return (self.d_in, self.rank) if operation == "shrink" else (self.rank, self.d_out)


def products(modules: Mapping[str, tuple[int, int]], slots: int, rank: int) -> list[Product] | None:
    """The products of an engine whose adapters change these linears, (d_in, d_out) each; None: vLLM merges some."""
    if not set(modules) <= _NOT_MERGED:
        return None
    return [Product(slots, rank, *sizes) for sizes in modules.values()]


def folder() -> Path:
    """Where they are kept, for all GPUs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2l-vllm" / "lora-kernels"


def file_name(gpu: str, operation: str) -> str:
    """As vLLM names it. The base model's output is added to: vLLM's `add_inputs`."""
    name = gpu.replace(" ", "_").replace("-", "_")
    return f"{name}_SHRINK.json" if operation == "shrink" else f"{name}_EXPAND_TRUE.json"


def write(into: Path, gpu: str, operation: str, product: Product, found: Mapping[int, Config]) -> None:
    """Add the configurations for one product, by the number of rows, to the GPU's file."""
    path = into / file_name(gpu, operation)
    content = json.loads(path.read_text()) if path.exists() else {}
    k, n = map(str, product.sizes(operation))
    by_rows = content.setdefault(str(product.slots + 1), {}).setdefault("1", {})
    for rows, config in found.items():
        by_rows.setdefault(str(rows), {}).setdefault(k, {})[n] = config
    into.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def has(where: Path, gpu: str, wanted: Collection[Product]) -> bool:
    """Whether these products are tuned for this GPU."""
    for operation in OPERATIONS:
        path = where / file_name(gpu, operation)
        if not path.exists():
            return False
        content = json.loads(path.read_text())
        if not all(_holds(content, operation, product) for product in wanted):
            return False
    return bool(wanted)


def _holds(content: Any, operation: str, product: Product) -> bool:
    by_rows = content.get(str(product.slots + 1), {}).get("1", {})
    k, n = map(str, product.sizes(operation))
    return bool(by_rows) and all(n in by_k.get(k, {}) for by_k in by_rows.values())
