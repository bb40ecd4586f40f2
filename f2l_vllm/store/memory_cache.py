"""The hot set: in-memory copies of recently used adapters, bounded in bytes.

An adapter that the engine has dropped is loaded again from here. Copies are made in the background, so no answer waits
for them. The folder is on a memory file system. An orderly stop empties it. After a crash the next server keeps using
it, because a copy is compared with its manifest before it is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from f2l_vllm.store import manifest as manifests
from f2l_vllm.store.manifest import Manifests, StoreError

logger = logging.getLogger(__name__)
MEMORY = Path("/dev/shm")
_MOST_OFFERED = 256  # beyond this, adapters come faster than they are copied; the rest wait for their next use


class HotSet:
    """Adapters below one folder. Evicts the least recently used, never one in use or pinned. Thread-safe."""

    def __init__(self, folder: Path, limit: int, manifests: Manifests) -> None:
        """`limit` is in bytes."""
        self._folder, self._limit, self._manifests = folder, limit, manifests
        self._lock = threading.Lock()
        # The size of each copy in bytes, least recently used first. Looking at every file for each copy would cost more
        # than the copy. `path` notices when another process has removed a copy.
        self._sizes = OrderedDict(_left_behind(folder))
        self._copier = ThreadPoolExecutor(1, "f2l-hot")
        self._offered: set[str] = set()
        self.pinned: frozenset[str] = frozenset()
        self.in_use: Callable[[str], bool] = lambda _name: False

    @classmethod
    def open(cls, home: Path, limit: int, manifests: Manifests, memory: Path = MEMORY) -> HotSet | None:
        """The hot set of a data folder; None if `limit` is 0 or there is no usable memory file system.

        It takes at most half of what is free there, because others (Ray, torch) need it too.
        """
        if limit <= 0 or not os.access(memory, os.W_OK):
            return None
        folder = memory / f"f2l-{os.getuid()}-{hashlib.sha256(str(home).encode()).hexdigest()[:12]}"
        if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
            logger.warning("adapters are not kept in memory: %s belongs to somebody else", folder)
            return None
        return cls(folder, min(limit, shutil.disk_usage(memory).free // 2), manifests)

    def path(self, name: str) -> Path | None:
        """The path of the copy, checked or not, or None. The copy counts as used."""
        if name not in self._sizes:
            return None
        path = self._folder / name
        if not path.is_dir():
            self._sizes.pop(name, None)
            return None
        self._used(name)
        return path

    def sound_path(self, name: str) -> Path | None:
        """As `path`, but only for a copy that was checked and has not changed; reads no file."""
        if name not in self._sizes or not self._manifests.is_sound(path := self._folder / name):
            return None
        self._used(name)
        return path

    def distrust(self, name: str) -> None:
        """Have the copy checked again."""
        self._manifests.forget(self._folder / name)

    def offer(self, name: str, source: Path) -> None:
        """Have an adapter copied in soon if it has no copy."""
        if name in self._sizes or name in self._offered or len(self._offered) >= _MOST_OFFERED:
            return
        self._offered.add(name)

        def copy() -> None:
            self._offered.discard(name)
            with suppress(StoreError):  # the next caller who asks for it finds the damage
                self.put(name, source)

        try:
            self._copier.submit(copy)
        except RuntimeError:  # closed: the server stops
            self._offered.discard(name)

    def put(self, name: str, source: Path, *, evict: bool = True) -> Path | None:
        """Copy an adapter in and compare it with its manifest. None if there is no room; without `evict`, only
        free room counts.

        Raises:
            StoreError: its files are missing or damaged; nothing is kept.
        """
        target, work = self._folder / name, self._folder / f".{uuid.uuid4().hex}"
        with self._lock:
            if (made := self.sound_path(name)) is not None:  # by another thread, meanwhile
                return made
            try:
                size = _bytes(source)
                self._folder.mkdir(mode=0o700, exist_ok=True)
                if not self._make_room(size, evict):
                    return None
                manifests.copy(source, work, name)
                os.rename(work, target)
                self._sizes[name] = size
                self._manifests.note(target)
                if not source.is_dir():  # removed meanwhile
                    self._drop(name)
                    return None
            except StoreError:
                shutil.rmtree(work, ignore_errors=True)
                raise
            except OSError as error:
                shutil.rmtree(work, ignore_errors=True)
                if source.is_dir():
                    logger.warning("adapter %s is not kept in memory: %s", name, error)
                return target if target.is_dir() else None
        return target

    def remove(self, name: str) -> None:
        """Drop a copy; nothing happens if there is none."""
        with self._lock:
            self._drop(name)

    def names(self) -> list[str]:
        """The names in the folder, including work in progress."""
        return [path.name for path in self._folder.iterdir()] if self._folder.exists() else []

    def close(self) -> None:
        """Drop everything."""
        self._copier.shutdown(cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._sizes.clear()

    def _used(self, name: str) -> None:
        try:
            self._sizes.move_to_end(name)
        except KeyError:  # dropped meanwhile
            return

    def _drop(self, name: str) -> None:
        """The lock is held."""
        self._sizes.pop(name, None)
        self._manifests.forget(self._folder / name)
        grave = self._folder / f".{uuid.uuid4().hex}"
        try:
            os.rename(self._folder / name, grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)

    def _make_room(self, size: int, evict: bool) -> bool:
        """The lock is held."""
        free = self._limit - sum(self._sizes.values())
        for name in list(self._sizes) if evict else ():
            if free >= size:
                break
            if name not in self.pinned and not self.in_use(name):
                free += self._sizes.get(name, 0)
                self._drop(name)
        return free >= size


def _left_behind(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes of the copies left by a server that did not stop in order, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            if not path.name.startswith("."):
                found.append((path.stat().st_mtime, path.name, _bytes(path)))
        except OSError:  # gone meanwhile
            continue
    return [(name, size) for _, name, size in sorted(found)]


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())
