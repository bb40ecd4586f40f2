"""A process's own folder for unfinished files. It is removed in the end, however the process ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

_OLD_SECONDS = 3600.0  # where locks cannot tell, a folder unchanged for so long has no owner


class Workspace:
    """This process's folder below one that many processes share. Thread-safe.

    The folder itself is locked as long as the process lives: a lock file could not be removed together with what it
    guards. Locks are visible on one machine only, so the folder's name
    begins with the machine's name.
    """

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._begin = threading.Lock()
        self._own: Path | None = None
        self._descriptor = -1

    def fresh(self) -> Path:
        """A path that nobody has used.

        Raises:
            OSError: for example, the disk is full or read-only.
        """
        with self._begin:
            while self._own is None or not self._own.is_dir():
                self.close()
                own = self._shared / f"{os.uname().nodename}.{uuid.uuid4().hex}"
                own.mkdir()
                with suppress(FileNotFoundError):  # cleared before it was locked: make another one
                    self._descriptor = os.open(own, os.O_RDONLY)
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                    self._own = own
            return self._own / uuid.uuid4().hex

    def close(self) -> None:
        """Remove the folder. Later paths are in another one."""
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
            os.close(self._descriptor)
            self._own = None

    def clear(self, old_s: float = _OLD_SECONDS) -> None:
        """Remove what ended processes left: at once if they ran on this machine, else when nothing has changed for
        `old_s` seconds."""
        for entry in self._shared.iterdir():
            with suppress(OSError):  # gone meanwhile, or it cannot be removed and is tried again later
                if entry.name.startswith(f"{os.uname().nodename}."):
                    _remove_unless_held(entry)
                elif entry.stat().st_ctime < time.time() - old_s:
                    remove(entry)


def remove(path: Path) -> None:
    """Remove a file or a directory; what cannot be removed stays until the next `Workspace.clear`."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _remove_unless_held(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(folder)  # a process that has just made it waits for the lock, and then sees that it is gone
    finally:
        os.close(descriptor)
