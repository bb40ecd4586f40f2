"""Room that is kept free on a disk, so that users who have filled it can delete files again.

Whatever makes the store larger is refused if less than the reserve would be left. A catalog in SQLite needs room for
every change, even for a deletion. It holds some in a separate file, which it removes when the disk is full anyway.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from f2l_vllm.store.errors import StoreUnavailable

_RESERVE_BYTES, _RESERVE_PART = 256 << 20, 8
_HEADROOM_BYTES, _HEADROOM_PART = 4 << 20, 16


class Reserve:
    """The part of a folder's disk that uploads, fetched videos and adapters leave free.

    Args:
        folder: a folder on the disk.
        size: bytes; None: 256 MiB, or an eighth of the disk if that is less.
    """

    def __init__(self, folder: Path, size: int | None = None) -> None:
        self._folder = folder
        self.size = min(_RESERVE_BYTES, _total(folder) // _RESERVE_PART) if size is None else size

    def check(self, what: str, more: int = 0, part: float = 1.0) -> None:
        """Check that writing `more` bytes leaves the reserve, or `part` of it, free. What is made from an upload may
        use some of the room that the next upload must leave.

        Raises:
            StoreUnavailable: it does not; `what` says what there is no room for.
        """
        if self.size and (free := self.free()) - more < self.size * part:
            raise StoreUnavailable(
                f"no room is left to {what}: the disk has {free / 1e6:.1f} MB free, and {self.size / 1e6:.1f} MB of it "
                "stay free so that files can be deleted",
                full=True,
            )

    def missing(self) -> int:
        """How many bytes must be freed to restore the reserve; negative if more is free."""
        return self.size - self.free()

    def free(self) -> int:
        """The free bytes of the disk."""
        return _free(self._folder)


class Headroom:
    """A file beside a database file. Removing it makes room for the journal of a deletion on a full disk."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(f"{database.name}-headroom")
        self._size = min(_HEADROOM_BYTES, _total(database.parent) // _HEADROOM_PART)
        self._is_there = self._path.exists()

    def check(self) -> None:
        """Check that the disk has at least this file's size free.

        Raises:
            StoreUnavailable: it has less.
        """
        if _free(self._path.parent) < self._size:
            raise StoreUnavailable("no room is left for the catalog", full=True)

    def adjust(self) -> None:
        """Give up the room when it is needed, and take it back once there is plenty. Called before every change."""
        free = _free(self._path.parent)
        if self._is_there and free < self._size:
            self._path.unlink(missing_ok=True)
            self._is_there = False
        elif not self._is_there and free >= 4 * self._size:
            with suppress(OSError):  # the disk filled up meanwhile, or is read-only
                self._take()

    def _take(self) -> None:
        try:
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
            self._is_there = True
        except OSError:
            self._path.unlink(missing_ok=True)
            raise


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _total(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize
