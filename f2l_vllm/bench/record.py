"""What is recorded with every number: the command, the machine and the versions."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from f2l_vllm.evaluation import environment


def write(path: Path, configuration: dict[str, Any], results: dict[str, Any]) -> None:
    """Write one result file."""
    record = {**header(configuration), "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def header(configuration: dict[str, Any]) -> dict[str, Any]:
    """The fields that every result begins with."""
    module = sys.modules["__main__"].__spec__
    started = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module.name]
    given = [re.sub("^(--api-key)=.*", r"\1=KEY", word) for word in sys.argv[1:]]
    hidden = ["KEY" if before == "--api-key" else word for before, word in zip([None, *given], given, strict=False)]
    return {
        "command": shlex.join([*started, *hidden]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "configuration": configuration,
        "machine": environment.machine(),
        "versions": environment.versions(),
    }


def peak_memory_mib(pid: int) -> float:
    """The process's peak resident set, MiB, as the kernel counted it."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")), 0.0)


def restart_high_water_mark() -> float:
    """Give free memory back to the system, count the peak from here on, and return the MiB held now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_mib(os.getpid())
