"""A folder for one replica on this node: what the replica leaves there, the next one finds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout


@dataclass(frozen=True)
class Slot:
    """A numbered folder that belongs to one replica until it lets go of `lock`, or ends."""

    folder: Path
    lock: FileLock
    _NAME: ClassVar[str] = "replica.lock"

    @classmethod
    def take(cls, shared: Path, *locks: str) -> Slot:
        """The first folder in `shared` that no other replica has, and no process that has outlived its replica.

        Args:
            locks: files in the folder that such processes lock.
        """
        for number in itertools.count():
            folder = shared / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            mine = FileLock(folder / cls._NAME, thread_local=False)
            try:
                mine.acquire(timeout=0)
                for name in locks:
                    (folder / name).parent.mkdir(exist_ok=True)
                    FileLock(folder / name).acquire(timeout=0).lock.release()
            except Timeout:
                mine.release()
                continue
            return cls(folder, mine)
        raise AssertionError("counting does not end")

    def left(self) -> Iterator[Path]:
        """The folders beside this one that no replica has, each locked until the next one is asked for."""
        for folder in sorted(self.folder.parent.iterdir()):
            if folder == self.folder:
                continue
            try:
                with FileLock(folder / self._NAME).acquire(timeout=0):
                    yield folder
            except Timeout:
                pass

    def drop_old(self, pattern: str, keep: int) -> None:
        """Remove the files of this pattern in the folder, but for the newest."""
        found = sorted(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in found[keep:]:
            old.unlink()
