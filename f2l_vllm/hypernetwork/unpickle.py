"""Loads files of `torch.save` without executing anything that they contain (`pickled`).

A file is first read without its tensors in a process with little memory and time, so that whatever it may still break
only breaks that process and becomes an error message.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from f2l_vllm.hypernetwork import pickled


def load(
    path: Path, records: Iterable[tuple[str, str]], enums: Iterable[tuple[str, str]], weights: bool = True
) -> dict[str, Any]:
    """Load a flat dict saved with `torch.save`.

    Args:
        records: (module, class) names whose objects become `Record`s.
        enums: (module, class) names of text enums, whose members become `str`.
        weights: False leaves the dict's own tensors unread; they come back on the meta device.

    Returns:
        name -> tensor, number, text, container or Record; inside containers and records tensors become lists.

    Raises:
        ValueError: the file is not of this kind, damaged, or asks for anything else; nothing in it was executed.
        FileNotFoundError: no such file.
    """
    records, enums = list(records), list(enums)
    _examine(path, records, enums)
    return pickled.read(path, records, enums, lambda tensor: tensor.tensor if weights else tensor.shape_only())


def _examine(path: Path, records: list[tuple[str, str]], enums: list[tuple[str, str]]) -> None:
    """Read the file without its tensors in a process of its own; raises like `load`."""
    with path.open("rb"):
        pass
    known = json.dumps({"records": records, "enums": enums})
    command = [sys.executable, "-I", pickled.__file__, str(path)]
    done = subprocess.run(command, input=known, capture_output=True, text=True, errors="replace")
    if done.returncode == pickled.REFUSED:
        raise ValueError(done.stdout)
    if done.returncode:
        how = f"by signal {-done.returncode}" if done.returncode < 0 else f"with code {done.returncode}"
        raise ValueError(
            f"{path} was refused, and nothing in it was executed: the process that examined it ended {how}, "
            f"within {pickled.EXAMINED_BYTES >> 20} MiB and {pickled.EXAMINED_SECONDS} s."
        )
