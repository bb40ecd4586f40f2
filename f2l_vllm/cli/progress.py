"""How commands show their progress: a bar on a terminal, elsewhere a line now and then, for a log.

Lines go to stderr, because another program may read a command's answer from stdout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY_SECONDS = 10.0
_log = Console(stderr=True)
Tell = Callable[[str, float, float | None], None]  # stage, amount done, total (None: not known yet)


@contextmanager
def progress(console: Console, every: float = EVERY_SECONDS) -> Iterator[Tell]:
    """Show stages that run one after another or together. A total of 1 is shown in per cent, any other as a count.

    Without a terminal, a stage prints a line when it begins, when it is done, and about every `every` seconds between.
    """
    if console.is_terminal:
        with _bars(console) as tell:
            yield tell
    else:
        yield _Lines(every)


def say(console: Console, text: str) -> None:
    """Print a line for people: above the bars on a terminal, elsewhere on stderr."""
    if console.is_terminal:
        console.print(text, markup=False, highlight=False)
    else:
        _line(text)


@contextmanager
def status(console: Console, what: str) -> Iterator[None]:
    """Show that something takes a while, for an unknown time."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        _line(f"{what} …")
        yield


class _Lines:
    def __init__(self, every: float) -> None:
        self._every = every
        self._begun: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._done: set[str] = set()

    def __call__(self, stage: str, done: float, total: float | None) -> None:
        at = time.monotonic()
        begun = self._begun.setdefault(stage, at)
        is_done = total is not None and done >= total
        if stage in self._done or not (is_done or at - self._told.get(stage, -self._every) >= self._every):
            return
        self._told[stage] = at
        if is_done:
            self._done.add(stage)
        amount = "" if not total else f"{done / total:.0%}" if total == 1 else f"{done:g} of {total:g}"
        _line(f"{stage}: {amount}, {at - begun:.0f} s" if amount else f"{stage} …")


def _line(text: str) -> None:
    _log.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars(console: Console) -> Iterator[Tell]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: float, total: float | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=None)
            scale = 100 if total == 1 else 1  # counted in per cent
            bars.update(tasks[stage], completed=round(done * scale), total=None if total is None else total * scale)

        yield tell
