"""The output folder of a training run: new, with an unfinished run, or with a result, replaced only on request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from f2l_vllm.files import atomic_directory

LOG_FILE = "log.jsonl"
REPORT_FILE = "training.json"
BEST = "hypernetwork"  # what is served, and what an extension goes on from
LAST = "hypernetwork-last"  # the last weights, where those of the best validation are served
RUN_FOLDER = ".run"  # checkpoints and log of a run that is not finished
START_FOLDER = "start"  # inside it: the result that an extension goes on from
_ENDED_FOLDER = ".run.ended"


def check(output: Path, finished: Sequence[str], *, run: str = RUN_FOLDER, overwrite: bool, extend: bool) -> None:
    """Check that a run may write to a folder. An unfinished run of the same kind may go on.

    Args:
        finished: file names that a finished run leaves; any of them is a result.
        run: name of the folder in which an unfinished run keeps its files.
        overwrite: the run starts anew, whatever is there.
        extend: the run goes on from the result.

    Raises:
        ValueError: the run may not write there; the message names the flags that would let it.
    """
    if overwrite and extend:
        raise ValueError("--extend goes on from what the folder holds and --overwrite replaces it: give one of them")
    if overwrite:
        return
    is_unfinished, is_extension = any((output / run).glob("*.ckpt")), (output / run / START_FOLDER).is_dir()
    there = [name for name in finished if (output / name).exists()]
    if is_unfinished and is_extension != extend:
        kind, flag = ("an unfinished extension", "with") if is_extension else ("an unfinished run", "without")
        raise ValueError(f"{output} holds {kind}: go on {flag} --extend, or start anew with --overwrite")
    if extend and not there:
        raise ValueError(f"{output} holds no finished run that could be extended: leave out --extend")
    if there and not is_unfinished and not extend:
        ways = "--overwrite starts anew" if run != RUN_FOLDER else "--extend goes on from it, --overwrite starts anew"
        raise ValueError(f"{output} holds a finished run ({', '.join(there)}): {ways}, or name another folder")


def prepare(output: Path, *, run: str = RUN_FOLDER, overwrite: bool, extend: bool) -> None:
    """Delete an unfinished run, or copy the result that an extension goes on from; one process does it, after `check`.

    A result stays until a new one replaces it.
    """
    shutil.rmtree(output / _ENDED_FOLDER, ignore_errors=True)
    start = output / run / START_FOLDER
    if overwrite:
        shutil.rmtree(output / run, ignore_errors=True)
        (output / run).mkdir(parents=True)
    elif extend and not start.is_dir():
        shutil.rmtree(output / run, ignore_errors=True)
        with atomic_directory(start) as staging:
            shutil.copytree(output / BEST, staging / BEST)
            for name in (REPORT_FILE, LOG_FILE):
                if (output / name).exists():
                    shutil.copy(output / name, staging / name)
            if (output / LOG_FILE).exists():
                shutil.copy(output / LOG_FILE, output / run / LOG_FILE)


def end(output: Path, run: str = RUN_FOLDER) -> None:
    """Put the log beside the result and remove the run's folder; repeating a run that was killed here finishes it."""
    log = output / run / LOG_FILE
    if log.exists():
        log.replace(output / LOG_FILE)
    (output / run).rename(output / _ENDED_FOLDER)
    shutil.rmtree(output / _ENDED_FOLDER)


def earlier(output: Path) -> list[dict[str, Any]]:
    """The reports of the runs that the run in the folder extends, oldest first."""
    path = output / RUN_FOLDER / START_FOLDER / REPORT_FILE
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    return [*report.pop("extends", []), report]
