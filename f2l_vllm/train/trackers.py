"""The figures of a run in TensorBoard, Weights & Biases or Trackio, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from f2l_vllm.files import lasting_name

PROJECT = "f2l-vllm"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # tracker -> what it imports
_NAME_FILE = "run-name"  # of the run, in the trackers: a run that goes on after a kill keeps it


def check_trackers(names: Sequence[str]) -> None:
    """Check that these trackers can be used, without loading them.

    Raises:
        ValueError: there is no such tracker, or its package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"--log-with: there is no tracker {name!r}; choose from {', '.join(PACKAGES)}.")
        if find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"--log-with {name} needs the package {PACKAGES[name]}, which is not installed: "
                f"pip install 'f2l-vllm[{name}]'."
            )


class Trackers:
    """Passes the figures of a run on, as `Loop.on_log`. Only the main process makes one. As a context manager it writes
    what is not written, however the run ends.

    Args:
        names: of trackers that accelerate knows.
        run: folder of the run, which keeps its name.
        output: TensorBoard's files lie in `tensorboard/NAME` below it, Weights & Biases' in `wandb`.
        options: what the run was started with.
    """

    def __init__(self, names: Sequence[str], run: Path, output: Path, options: Mapping[str, Any]) -> None:
        self._names, self._output = list(names), output
        self._run = lasting_name(run / _NAME_FILE)
        self._options = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in options.items()
        }
        self._open: list[Any] | None = None

    def log(self, stage: str, step: int, steps: int, figures: Mapping[str, float]) -> None:
        """Enter the figures of a step."""
        if self._open is None:
            self._open = [self._start(name, step) for name in self._names]
        for tracker in self._open:
            tracker.log({f"{stage}/{name}": value for name, value in figures.items()}, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._open or []:
            tracker.finish()

    def _start(self, name: str, step: int) -> Any:
        """A tracker whose first figures are those of `step`: a run that goes on may take steps again."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        where = (self._run, self._output / name) if kind.requires_logging_directory else (PROJECT,)
        going_on: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": step},
            "wandb": {"id": self._run, "resume": "allow", "dir": str(self._output)},
            "trackio": {"name": self._run, "resume": "allow"},
        }
        tracker = kind(*where, **going_on.get(name, {}))
        tracker.start()
        tracker.store_init_configuration(self._options)
        return tracker
