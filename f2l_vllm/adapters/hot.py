"""The hot set: copies in memory of the adapters used most, bounded in bytes.

An adapter that the engine has dropped is loaded again from here. The folder lies on a memory file system; an orderly
stop empties it, and after a crash the next server goes on with it: copies are checked before they are loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)
MEMORY = Path("/dev/shm")


class HotSet:
    """Adapters below one folder; least recently used out first, never one in use or pinned. Safe among threads."""

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit` in bytes."""
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self.pinned: frozenset[str] = frozenset()
        self.in_use: Callable[[str], bool] = lambda _name: False

    @classmethod
    def open(cls, home: Path, limit: int, memory: Path = MEMORY) -> HotSet | None:
        """The hot set of a data folder; None without a memory file system, or with no room in it.

        At most half of what is free there is taken: others (Ray, torch) need it too.
        """
        if limit <= 0 or not os.access(memory, os.W_OK):
            return None
        folder = memory / f"f2l-{os.getuid()}-{hashlib.sha256(str(home).encode()).hexdigest()[:12]}"
        if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
            logger.warning("adapters are not kept in memory: %s belongs to somebody else", folder)
            return None
        return cls(folder, min(limit, shutil.disk_usage(memory).free // 2))

    def path(self, name: str) -> Path | None:
        """Where the copy lies, and that it was used; None if there is none."""
        path = self._folder / name
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def put(self, name: str, source: Path) -> Path | None:
        """Copy an adapter in; None if there is no room for it."""
        size = sum(file.stat().st_size for file in source.iterdir())
        target, work = self._folder / name, self._folder / f".{uuid.uuid4().hex}"
        with self._lock:
            try:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                if not self._make_room(size):
                    return None
                shutil.copytree(source, work)
                os.rename(work, target)
            except OSError as error:
                shutil.rmtree(work, ignore_errors=True)
                logger.warning("adapter %s is not kept in memory: %s", name, error)
                return target if target.is_dir() else None
        return target

    def remove(self, name: str) -> None:
        """Drop a copy; nothing happens if there is none."""
        grave = self._folder / f".{uuid.uuid4().hex}"
        try:
            os.rename(self._folder / name, grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)

    def names(self) -> list[str]:
        """What is there, work in progress included."""
        return [path.name for path in self._folder.iterdir()] if self._folder.exists() else []

    def close(self) -> None:
        """Drop everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make_room(self, size: int) -> bool:
        entries = []
        for path in self._folder.iterdir():
            try:
                used = path.stat().st_mtime
                entries.append((used, path.name, sum(file.stat().st_size for file in path.iterdir())))
            except FileNotFoundError:  # gone meanwhile
                continue
        free = self._limit - sum(entry[2] for entry in entries)
        for _, name, freed in sorted(entries):
            if free >= size:
                break
            if name not in self.pinned and not self.in_use(name):
                self.remove(name)
                free += freed
        return free >= size
