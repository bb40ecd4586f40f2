"""The machine and the versions that are reported with every number."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("f2l-vllm", "vllm", "torch", "transformers", "ray", "av", "scipy")


def machine() -> dict[str, Any]:
    """CPU model, cores, memory and device of this machine."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load_average": os.getloadavg(),
        "system": platform.platform(),
    }


def name(machine: Mapping[str, Any]) -> str:
    """What computes on a machine: its GPU, or its cores."""
    return str(machine["device"]) if machine["device"] != "cpu" else f"{machine['cores']} cores of {machine['cpu']}"


def folder_name(machine: Mapping[str, Any]) -> str:
    """The same as the name of a folder."""
    return re.sub("[^A-Za-z0-9.]+", "-", name(machine)).strip("-")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape a result; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
