"""Videos and adapters on disk: content-addressed, immutable, and either wholly there or not at all.

Layout under `F2L_HOME`::

    videos/<2 hex>/<sha256>.<generation>   the bytes as uploaded, one copy however many file ids share them
    adapters/<name>/                 PEFT files and manifest.json (sizes and sha-256 of each file)
    tmp/<machine>.<32 hex>/          work in progress of one process

Everything is written under `tmp/`, synced, and renamed into place. What a process that was killed left there goes when
the store is opened next. With a remote store (`F2L_STORE`) that is where
everything is kept, and these folders are a cache of what is used here, bounded in bytes by `trim`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from f2l_vllm.files import sync
from f2l_vllm.store import manifest as manifests
from f2l_vllm.store.errors import StoreUnavailable, disk_errors
from f2l_vllm.store.manifest import MANIFEST_FILE, Manifests, StoreError
from f2l_vllm.store.memory_cache import HotSet
from f2l_vllm.store.object_store import Remote
from f2l_vllm.store.room import Reserve
from f2l_vllm.store.workspace import Workspace, remove

__all__ = ["MANIFEST_FILE", "Store", "StoreError"]

_VIDEO = re.compile(r"([0-9a-f]{64})(\.[0-9a-f]{16})?")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
_YOUNG_SECONDS = 60.0  # what was used this recently is not taken from the cache: somebody may be about to open it


class Store:
    """One data folder on a local file system, shared by the server and its workers, and what lies behind it.

    Every method that reads or writes raises `StoreUnavailable` when the disk is full or read-only, or the remote store
    is away; nothing half-written is left then.
    """

    def __init__(
        self,
        home: Path,
        *,
        url: str | None = None,
        cache_bytes: int = 0,
        hot_bytes: int = 0,
        reserve_bytes: int | None = None,
    ) -> None:
        """
        Args:
            home: the data folder.
            url: the remote store, any fsspec URL; None: the data folder is the store.
            cache_bytes: how much of a remote store is kept in the data folder; 0: no limit.
            hot_bytes: how much is kept on /dev/shm besides; 0: nothing.
            reserve_bytes: how much of the disk stays free; None: as `Reserve`.
        """
        self.home = home
        self._videos, self._adapters, self._tmp = home / "videos", home / "adapters", home / "tmp"
        with disk_errors("use its data folder"):
            for folder in (self._videos, self._adapters, self._tmp):
                folder.mkdir(parents=True, exist_ok=True)
            self.reserve = Reserve(home, reserve_bytes)
        self._workspace = Workspace(self._tmp)
        self._workspace.clear()
        self._remote = None if url is None else Remote(url)
        self._cache_bytes = cache_bytes
        self._manifests = Manifests()
        self._hot = HotSet.open(home, hot_bytes, self._manifests)
        self._in_use: Callable[[str], bool] = lambda _name: False

    def protect(self, in_use: Callable[[str], bool]) -> None:
        """Have `in_use(adapter name)` asked before an adapter is taken from the cache or the hot set."""
        self._in_use = in_use
        if self._hot is not None:
            self._hot.in_use = in_use

    def pin(self, names: set[str]) -> None:
        """These adapters, and no others, stay in the hot set however long they are not used."""
        if self._hot is not None:
            self._hot.pinned = frozenset(names)

    def close(self) -> None:
        """Give the memory of the hot set back, and drop work in progress."""
        self._workspace.close()
        if self._hot is not None:
            self._hot.close()

    def sweep(
        self, named: Callable[[Collection[str]], Collection[str]], older_than_s: float = 3600.0, *, far: bool = True
    ) -> None:
        """Remove what an interrupted process left: work in progress, and what nobody refers to.

        Args:
            named: those of some names, of adapters and videos, that something refers to.
            older_than_s: younger entries may be in the making, and stay.
            far: in the remote store too.
        """
        limit = time.time() - older_than_s
        self._workspace.clear(older_than_s)
        here = {path.name: path for path in [*self._adapters.iterdir(), *self._videos.glob("*/*")]}
        old = [name for name, path in here.items() if _changed(path) < limit]
        for name in set(old).difference(named(old)):
            remove(here[name])
        if self._hot is not None:
            hot = self._hot.names()
            for name in set(hot).difference(named(hot)):
                self._hot.remove(name)
        if far and self._remote is not None:
            self._remote.sweep(named, older_than_s)

    def clear(self) -> None:
        """Remove work in progress of processes that have ended."""
        self._workspace.clear()

    @property
    def is_cache(self) -> bool:
        """Whether the data folder is a cache of a remote store, to be trimmed."""
        return self._remote is not None

    def trim(self, videos_in_use: set[str], young_s: float = _YOUNG_SECONDS) -> int:
        """Bring the cache of a remote store under its limit, and out of the reserve, least recently used out first; the
        bytes freed.

        What is in use stays, videos by their hashes, and what was used within `young_s` seconds, even if that is more
        than the limit.
        """
        if self._remote is None:
            return 0
        entries = [(*_used(path), path) for path in [*self._adapters.iterdir(), *self._videos.glob("*/*")]]
        limit = self._cache_bytes or sys.maxsize
        over = max(sum(size for _, size, _ in entries) - limit, self.reserve.missing())
        freed = 0
        for used, size, path in sorted(entries):
            if freed >= over or used > time.time() - young_s:
                break
            if path.name.partition(".")[0] not in videos_in_use and not self._in_use(path.name):
                self._drop(path)
                freed += size
        return freed

    def temporary(self) -> Path:
        """A fresh path for work in progress, on the same file system as everything else."""
        with disk_errors("write"):
            return self._workspace.fresh()

    def discard(self, temporary: Path) -> None:
        """Drop work in progress."""
        remove(temporary)

    # Videos, each under the name that the catalog gives its bytes: their hash and a generation

    def video_path(self, video: str) -> Path:
        """Where these bytes lie in the data folder, whether or not they are there."""
        if not _VIDEO.fullmatch(video):
            raise ValueError(f"not a sha-256 with a generation: {video!r}")
        return self._videos / video[:2] / video

    def keep_video(self, temporary: Path, video: str) -> Path:
        """Move an uploaded file into place."""
        target = self.video_path(video)
        self.reserve.check("keep a video")
        with disk_errors("keep a video"):
            if self._remote is not None:
                self._remote.put_video(temporary, video)
            target.parent.mkdir(exist_ok=True)
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        return target

    def fetch_video(self, video: str) -> Path:
        """The video's bytes as a local file, fetched and checked if they are not here.

        Raises:
            StoreError: they are nowhere, or not what was uploaded.
        """
        path = self.video_path(video)
        if self._remote is None:
            if not path.is_file():
                raise StoreError(f"the video {video} is missing")
            return path
        if _touch(path):
            return path
        with self._work() as work:
            try:
                self._remote.get_video(video, work)
            except FileNotFoundError as error:
                raise StoreError(f"the video {video} is missing") from error
            if manifests.sha256_of(work) != video.partition(".")[0]:
                raise StoreError(f"the video {video} differs from what was uploaded")
            with disk_errors("keep a video"):
                path.parent.mkdir(exist_ok=True)
                os.replace(work, path)
        return path

    def has_video(self, video: str, size: int | None = None) -> bool:
        """Whether the bytes are stored, `size` of them if that is given."""
        if self._remote is not None:
            found = self._remote.video_size(video)
        else:
            path = self.video_path(video)
            found = path.stat().st_size if path.is_file() else None
        return found is not None and size in (None, found)

    def remove_video(self, video: str) -> None:
        """Forget the bytes; nothing happens if they are gone already."""
        with disk_errors("remove a video"):
            self.video_path(video).unlink(missing_ok=True)
        if self._remote is not None:
            self._remote.remove_video(video)

    # Adapters

    def adapter_path(self, name: str) -> Path:
        """The directory of this adapter in the data folder, whether or not it is there."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"not an adapter name: {name!r}")
        return self._adapters / name

    def load_path(self, name: str) -> Path:
        """A local directory to load the adapter from: whole, checked, fetched if need be; in memory once it is there.

        Raises:
            StoreError: no such adapter, or a file that is missing or differs from what was written.
        """
        if (copy := self._checked_copy(name)) is not None:
            return copy
        path = self._checked(name)
        if self._hot is not None:
            self._hot.offer(name, path)
        return path

    def load_path_at_once(self, name: str) -> Path | None:
        """The same where nothing has to be read for it: a copy in memory that is known to be sound. Four system calls
        on a memory file system, so an event loop may ask."""
        return None if self._hot is None else self._hot.sound_path(name)

    def distrust(self, name: str) -> None:
        """Have an adapter's files read and compared at its next load, whether or not they seem to have changed."""
        self._manifests.forget(self.adapter_path(name))
        if self._hot is not None:
            self._hot.distrust(name)

    def prepare(self, name: str) -> bool:
        """Copy a published adapter into memory before anybody asks for it; False when there is no more room."""
        if self._hot is None:
            return False
        if self._hot.path(name) is not None:
            return True
        try:
            return self._hot.put(name, self.adapter_path(name), evict=False) is not None
        except StoreError:  # not here, or damaged: fetched where there is somewhere to fetch it from
            return self._hot.put(name, self._checked(name), evict=False) is not None

    def publish_adapter(
        self, name: str, write: Callable[[Path], Mapping[str, str] | None], manifest: dict[str, Any]
    ) -> Path:
        """Let `write` fill a directory, add the manifest, and rename the whole into place.

        What `write` returns, the sha-256 of files that it has read, is not computed again.

        The adapter of a name is immutable: if it is there and sound, the new copy is dropped. `write` may raise;
        nothing is left behind then.
        """
        target = self.adapter_path(name)
        self.check_room_for_adapters()
        with self._work() as work, disk_errors("keep an adapter"):
            known = write(work) or {}
            self.check_room_for_adapters()
            manifests.write(work, name, manifest, known)
            for file in work.iterdir():
                sync(file)
            sync(work)
            try:
                self.verify_adapter(name)
            except StoreError:
                if self._remote is not None:
                    self._remote.put_adapter(work, name)
                self._drop(target)
                os.rename(work, target)
                sync(target.parent)
            else:
                if self._remote is not None and not self._remote.has_adapter(name):
                    self._remote.put_adapter(target, name)
        return target

    def check_room_for_adapters(self) -> None:
        """Whether `publish_adapter` may begin: uploads leave room for what is made of them."""
        self.reserve.check("keep an adapter", part=0.5)

    def verify_adapter(self, name: str) -> dict[str, Any]:
        """Read every file, check it against the manifest, and return that; a damaged cached copy is fetched again.

        Raises:
            StoreError: no such adapter, or a file that is missing or differs from what was written.
        """
        path = self.adapter_path(name)
        if self._remote is None:
            return manifests.verify(path, name)
        try:
            manifest = manifests.verify(path, name)
        except StoreError:
            return self._fetch_adapter(name, self._remote)
        _touch(path)
        return manifest

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter in one step (a rename), then its files."""
        path = self.adapter_path(name)
        with disk_errors("remove an adapter"):
            self._drop(path)
        if self._hot is not None:
            self._hot.remove(name)  # last: what is being copied now finds that its source has gone
        if self._remote is not None:
            self._remote.remove_adapter(name)

    def _checked_copy(self, name: str) -> Path | None:
        """The copy in memory, if there is one and it is sound."""
        if self._hot is None or (copy := self._hot.path(name)) is None:
            return None
        try:
            self._manifests.check(copy, name)
        except StoreError:
            self._hot.remove(name)
            return None
        return copy

    def _checked(self, name: str) -> Path:
        """The adapter in the data folder, sound. Raises as `verify_adapter`."""
        path = self.adapter_path(name)
        try:
            self._manifests.check(path, name)
        except StoreError:
            if self._remote is None:
                raise
            self._fetch_adapter(name, self._remote)
        if self._remote is not None:
            _touch(path)
        return path

    def _fetch_adapter(self, name: str, remote: Remote) -> dict[str, Any]:
        path = self.adapter_path(name)
        with self._work() as work, disk_errors("keep an adapter"):
            work.mkdir()
            try:
                remote.get_adapter_file(name, MANIFEST_FILE, work / MANIFEST_FILE)
                for file in manifests.read(work, name)["files"]:
                    remote.get_adapter_file(name, file, work / file)
            except FileNotFoundError as error:
                raise StoreError(f"adapter {name} is missing or damaged: {error}") from error
            manifest = manifests.verify(work, name)
            self._drop(path)
            try:
                os.rename(work, path)
            except OSError:
                manifests.verify(path, name)  # somebody else fetched it meanwhile
        return manifest

    def _drop(self, path: Path) -> None:
        """Take a file or directory out of the data folder in one step, then its bytes."""
        self._manifests.forget(path)
        try:
            grave = self.temporary()
        except StoreUnavailable as error:
            if not error.full:
                raise
            # No room for a folder to move it to: then without its manifest first, so that what is left is no adapter.
            (path / MANIFEST_FILE).unlink(missing_ok=True)
            grave = path
        else:
            try:
                os.rename(path, grave)
            except FileNotFoundError:
                return
        remove(grave)

    @contextmanager
    def _work(self) -> Iterator[Path]:
        """A fresh path, of which nothing is left afterwards."""
        work = self.temporary()
        try:
            yield work
        finally:
            remove(work)


def _touch(path: Path) -> bool:
    """Note that a cached entry was used; whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _used(path: Path) -> tuple[float, int]:
    """When a cached entry was used, and its bytes."""
    try:
        status = path.stat()
        size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else status.st_size
    except FileNotFoundError:  # gone meanwhile
        return time.time(), 0
    return status.st_mtime, size


def _changed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:  # gone meanwhile
        return time.time()
