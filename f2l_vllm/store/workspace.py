"""Where a process writes what is not whole yet: a folder of its own, of which nothing is left however it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

_OLD_SECONDS = 3600.0  # what has not changed for so long is nobody's, where a lock cannot say so


class Workspace:
    """This process's folder below one that many processes share. Safe among threads.

    The folder is locked as long as the process lives. Locks are seen on one machine only, so its name begins with the
    machine's.
    """

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._begin = threading.Lock()
        self._own: Path | None = None
        self._descriptor = -1

    def fresh(self) -> Path:
        """A path that nobody has used.

        Raises:
            OSError: as of a disk that is full or read-only.
        """
        with self._begin:
            while self._own is None or not self._own.is_dir():
                self.close()
                own = self._shared / f"{os.uname().nodename}.{uuid.uuid4().hex}"
                own.mkdir()
                with suppress(FileNotFoundError):  # cleared before it was locked: another one
                    self._descriptor = os.open(own, os.O_RDONLY)
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                    self._own = own
            return self._own / uuid.uuid4().hex

    def close(self) -> None:
        """Remove the folder. A path asked for later is in another one."""
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
            os.close(self._descriptor)
            self._own = None

    def clear(self, old_s: float = _OLD_SECONDS) -> None:
        """Remove what processes left that have ended: at once if they ran here, else when nothing has changed for
        `old_s` seconds."""
        for entry in self._shared.iterdir():
            with suppress(OSError):  # gone meanwhile, or it cannot be removed: it is looked at again
                if entry.name.startswith(f"{os.uname().nodename}."):
                    _remove_unless_held(entry)
                elif entry.stat().st_ctime < time.time() - old_s:
                    remove(entry)


def remove(path: Path) -> None:
    """Drop a file or a directory; what a disk does not let go of stays until it is cleared."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _remove_unless_held(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(folder)  # whoever has just made it waits for the lock, and sees that it is gone
    finally:
        os.close(descriptor)
