"""`f2l-vllm tune`: launch configurations of vLLM's LoRA kernels for this GPU, which `serve` then uses."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.cli import gpus
from f2l_vllm.engine import defaults, tuned
from f2l_vllm.server.inputs import Inputs

if TYPE_CHECKING:
    from f2l_vllm.engine.tuning import Time


def serving_products(inputs: Inputs, flags: Namespace) -> list[tuned.Product] | None:
    """What an engine with these flags multiplies for adapters; None: vLLM merges some of its linears."""
    if getattr(flags, "lora_target_modules", None) is not None:
        return None
    slots = getattr(flags, "max_loras", None)
    places = getattr(flags, "max_cpu_loras", None) or defaults.HOST_ADAPTERS
    rank = int(getattr(flags, "max_lora_rank", None) or inputs.engine_rank(flags))
    shapes = BaseShapes.read(inputs.model).modules
    modules = {name: shapes[name] for name in inputs.config.modules}
    return tuned.products(modules, slots or min(defaults.SEQUENCES, places), rank)


def environment(inputs: Inputs, flags: Namespace, gpu: str | None) -> dict[str, str]:
    """The variable that has vLLM read the files, if they hold what this engine multiplies on this GPU."""
    wanted = serving_products(inputs, flags)
    if gpu is None or wanted is None or not tuned.has(tuned.folder(), gpu, wanted):
        return {}
    return {tuned.VARIABLE: str(tuned.folder())}


def tune(
    inputs: Inputs, flags: Namespace, overwrite: bool, timer: Callable[[tuned.Product], Time] | None = None
) -> None:
    """Search, write, and say what it brought.

    Args:
        timer: makes what measures a product; None: vLLM's kernels on this GPU.

    Raises:
        ValueError: there is no GPU, or vLLM merges the linears that adapters change.
    """
    found = gpus.find()
    if found.name is None:
        why = found.unused() or "this machine has no NVIDIA GPU"
        raise ValueError(f"tune measures vLLM's LoRA kernels on a GPU, and there is none to measure on: {why}")
    wanted = serving_products(inputs, flags)
    if wanted is None:
        raise ValueError(
            f"adapters change {', '.join(inputs.config.modules)}, of which vLLM merges some into one linear: those "
            "kernels keep vLLM's own configurations"
        )
    folder = tuned.folder()
    if tuned.has(folder, found.name, wanted) and not overwrite:
        typer.echo(f"{found.name} is tuned already, in {folder}: --overwrite measures again")
        return
    os.environ.update(gpus.drivers_order())
    from f2l_vllm.engine import tuning

    tuning.tune(folder, found.name, wanted, typer.echo, timer)
    typer.echo(f"written to {folder}; f2l-vllm serve uses them on {found.name}")
