"""`f2l-vllm doctor`: what is installed, which device, and what `serve` would use."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from f2l_vllm import torch_shims
from f2l_vllm.cli import checks, gpus
from f2l_vllm.cli.serve import Launch

_PACKAGES = ("f2l-vllm", "vllm", "torch", "transformers", "ray", "av", "safetensors", "openai")


def doctor(launch: Callable[[], Launch]) -> Launch:
    """Print a table, and return what `serve` would run; exit with 1 when it could not start.

    Args:
        launch: plans what `serve` would run; a `ValueError` says why it would not.
    """
    console, problems = Console(), list[str]()
    planned: Launch | None = None
    table = Table(show_header=False, box=None)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    for package in _PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "[red]not installed[/]")
            problems.append(f"{package} is not installed: pip install f2l-vllm")
    torch_shims.install()
    found = gpus.Gpus()
    try:
        found = gpus.find()
        os.environ.update(gpus.drivers_order() if found.count else {})
    except ValueError as error:
        problems.append(str(error))
    device, memory, built_for = _device()
    table.add_row("device", device)
    table.add_row("memory", memory)
    if mismatch := found.mismatch(built_for):
        problems.append(mismatch)
    for group in ("vllm.platform_plugins", "vllm.general_plugins", "vllm.endpoint_plugins"):
        own = [entry.name for entry in entry_points(group=group) if entry.value.startswith("f2l_vllm.")]
        table.add_row(group, ", ".join(own) or "[red]missing[/]")
        if not own:
            problems.append(f"no plugin of f2l-vllm in {group}: install the package, do not only put it on the path")
    try:
        planned = launch()
        home = planned.settings.data_folder
        existing = next(folder for folder in (home, *home.parents) if folder.exists())
        table.add_row("data folder", f"{home} ({shutil.disk_usage(existing).free / 1e9:.0f} GB free)")
        table.add_row("model", planned.model)
        table.add_row("hypernetwork", planned.env["F2L_HYPERNETWORK"])
        table.add_row("workers", _workers(planned))
        table.add_row("serve runs", " ".join(planned.argv[3:]))
        checks.check_now(planned.settings, planned.flags)
    except ValueError as error:
        if str(error) not in problems:  # about the GPUs
            problems.append(str(error))
    console.print(table)
    if unused := found.unused():
        console.print(f"[yellow]note[/]: {escape(unused)}")
    for problem in problems:
        console.print(f"[red]problem[/]: {escape(problem)}")
    if problems or planned is None:
        raise typer.Exit(1)
    console.print("[green]ready to serve[/]")
    return planned


def _workers(planned: Launch) -> str:
    count, shares = planned.settings.hypernetwork_workers, planned.shares
    if not count:
        return "none"
    where = "on the CPU" if not shares.worker else f"with {shares.worker:g} of a GPU each"
    return f"{count} {where}" + (f" (of {shares.devices})" if shares.devices else "")


def _device() -> tuple[str, str, str | None]:
    """The device, the memory, and the CUDA that torch is built for."""
    import torch
    from vllm.platforms import current_platform

    with open("/proc/meminfo") as meminfo:
        total, _, available = (int(next(meminfo).split()[1]) / 2**20 for _ in range(3))
    built_for = torch.version.cuda
    memory = f"{total:.1f} GiB, {available:.1f} GiB available"
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", memory, built_for
    where = f"no GPU; vLLM runs on {type(current_platform).__name__} ({torch.get_num_threads()} threads)"
    return where, memory, built_for
