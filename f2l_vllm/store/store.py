"""Videos and adapters on disk: content-addressed, immutable, and either complete or absent.

Layout under `F2L_HOME`::

    videos/<2 hex>/<sha256>.<generation>   the bytes as uploaded, one copy however many file ids share them
    adapters/<name>/                 PEFT files and manifest.json (sizes and sha-256 of each file)
    tmp/<machine>.<32 hex>/          work in progress of one process

Everything is written under `tmp/`, synced, and renamed into place. Opening the store removes what a killed process
left there. With `F2L_STORE` these folders are a cache (`cached_store`).
"""

from __future__ import annotations

import os
import re
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
from f2l_vllm.store.room import Reserve
from f2l_vllm.store.workspace import Workspace, remove

__all__ = ["MANIFEST_FILE", "Store", "StoreError"]

_VIDEO = re.compile(r"([0-9a-f]{64})(\.[0-9a-f]{16})?")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,127}(\.[0-9a-f]{16})?")


class Store:
    """One data folder on a local file system, shared by the server and its workers.

    Every method that reads or writes raises `StoreUnavailable` when the disk is full or read-only, and then leaves
    nothing half-written.
    """

    is_cache = False  # whether the data folder is a cache that has to be trimmed

    def __init__(
        self,
        home: Path,
        *,
        hot_bytes: int = 0,
        reserve_bytes: int | None = None,
    ) -> None:
        """
        Args:
            home: the data folder.
            hot_bytes: how much is also kept on /dev/shm; 0: nothing.
            reserve_bytes: how much of the disk stays free; None: as in `Reserve`.
        """
        self.home = home
        self._videos, self._adapters, self._tmp = home / "videos", home / "adapters", home / "tmp"
        with disk_errors("use its data folder"):
            for folder in (self._videos, self._adapters, self._tmp):
                folder.mkdir(parents=True, exist_ok=True)
            self.reserve = Reserve(home, reserve_bytes)
        self._workspace = Workspace(self._tmp)
        self._workspace.clear()
        self._manifests = Manifests()
        self._hot = HotSet.open(home, hot_bytes, self._manifests)
        self._in_use: Callable[[str], bool] = lambda _name: False
        self._wanted: Callable[[str], bool] = lambda _name: True

    def protect(self, in_use: Callable[[str], bool], wanted: Callable[[str], bool] | None = None) -> None:
        """Set `in_use(adapter name)`: an adapter for which it is true is not evicted from the cache or the hot set. And
        `wanted`: one for which it is false was deleted, and is not kept if it was being fetched meanwhile."""
        self._in_use = in_use
        self._wanted = wanted or self._wanted
        if self._hot is not None:
            self._hot.in_use = in_use

    def pin(self, names: set[str]) -> None:
        """Keep exactly these adapters in the hot set even if nobody uses them."""
        if self._hot is not None:
            self._hot.pinned = frozenset(names)

    def close(self) -> None:
        """Free the memory of the hot set, and drop work in progress."""
        self._workspace.close()
        if self._hot is not None:
            self._hot.close()

    def sweep(
        self, named: Callable[[Collection[str]], Collection[str]], older_than_s: float = 3600.0, *, far: bool = True
    ) -> None:
        """Remove what an interrupted process left: work in progress, and what nobody refers to.

        Args:
            named: returns those of the given adapter and video names that something refers to.
            older_than_s: younger entries stay, because they may still be in the making. Ages are by this host's clock;
                that of an object store has to agree with it to within this time, less what the making takes.
            far: also sweep the store that the data folder is a cache of.
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

    def clear(self) -> None:
        """Remove work in progress of processes that have ended."""
        self._workspace.clear()

    def trim(self, videos_in_use: set[str]) -> int:
        """Shrink a cache below its limit. Returns the bytes freed."""
        return 0

    def temporary(self) -> Path:
        """A fresh path for work in progress, on the same file system as everything else."""
        with disk_errors("write"):
            return self._workspace.fresh()

    def discard(self, temporary: Path) -> None:
        """Drop work in progress."""
        remove(temporary)

    # Videos, each named by the hash of its bytes and a generation from the catalog

    def video_path(self, video: str) -> Path:
        """The path of these bytes in the data folder, whether or not they are there."""
        if not _VIDEO.fullmatch(video):
            raise ValueError(f"not a sha-256 with a generation: {video!r}")
        return self._videos / video[:2] / video

    def keep_video(self, temporary: Path, video: str) -> Path:
        """Move an uploaded file into place."""
        target = self.video_path(video)
        self.reserve.check("keep a video")
        with disk_errors("keep a video"):
            target.parent.mkdir(exist_ok=True)
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        return target

    def fetch_video(self, video: str) -> Path:
        """The video's bytes as a local file.

        Raises:
            StoreError: the bytes are missing, or differ from what was uploaded.
        """
        path = self.video_path(video)
        if not path.is_file():
            raise StoreError(f"the video {video} is missing")
        return path

    def has_video(self, video: str, size: int | None = None) -> bool:
        """Whether the bytes are stored, with length `size` if that is given."""
        path = self.video_path(video)
        found = path.stat().st_size if path.is_file() else None
        return found is not None and size in (None, found)

    def remove_video(self, video: str) -> None:
        """Remove the bytes; nothing happens if they are already gone."""
        with disk_errors("remove a video"):
            self.video_path(video).unlink(missing_ok=True)

    # Adapters

    def adapter_path(self, name: str) -> Path:
        """The directory of this adapter in the data folder, whether or not it is there."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"not an adapter name: {name!r}")
        return self._adapters / name

    def load_path(self, name: str) -> Path:
        """A local directory to load the adapter from, checked, and fetched if need be. A copy in memory is preferred.

        Raises:
            StoreError: there is no such adapter, or a file is missing or differs from what was written.
        """
        if (copy := self._checked_copy(name)) is not None:
            return copy
        path = self._checked(name)
        if self._hot is not None:
            self._hot.offer(name, path)
        return path

    def load_path_at_once(self, name: str) -> Path | None:
        """As `load_path`, but only for a copy in memory that is known to be sound, so no file is read. It makes four
        system calls on a memory file system, so an event loop may call it."""
        return None if self._hot is None else self._hot.sound_path(name)

    def distrust(self, name: str) -> None:
        """Have an adapter's files read and compared at its next load, even if they seem unchanged."""
        self._manifests.forget(self.adapter_path(name))
        if self._hot is not None:
            self._hot.distrust(name)

    def prepare(self, name: str) -> bool:
        """Copy a published adapter into memory before anybody asks for it; False if there is no room."""
        if self._hot is None:
            return False
        if self._hot.path(name) is not None:
            return True
        path = self.adapter_path(name)
        if path.is_dir():
            try:
                return self._hot.put(name, path, evict=False) is not None
            except StoreError:  # damaged
                pass
        return self._hot.put(name, self._checked(name), evict=False) is not None  # fetched, if there is a remote store

    def publish_adapter(
        self, name: str, write: Callable[[Path], Mapping[str, str] | None], manifest: dict[str, Any]
    ) -> Path:
        """Let `write` fill a directory, add the manifest, and rename the directory into place.

        `write` may return the sha-256 of files that it has read; these are not computed again.

        An adapter is immutable under its name: if it is there and sound, the new copy is dropped. If `write` raises,
        nothing is left behind.
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
                self._put_far(work, name)
                self._drop(target)
                os.rename(work, target)
                sync(target.parent)
            else:
                self._confirm_far(name)
        return target

    def check_room_for_adapters(self) -> None:
        """Check that `publish_adapter` has room. Uploads leave room for the adapters made from them. On a full disk the
        catalog gives up room for deletions, which is less than this."""
        self.reserve.check("keep an adapter", part=0.75)

    def verify_adapter(self, name: str) -> dict[str, Any]:
        """Read every file, check it against the manifest, and return the manifest.

        Raises:
            StoreError: there is no such adapter, or a file is missing or differs from what was written.
        """
        return manifests.verify(self.adapter_path(name), name)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter in one step (a rename), then its files."""
        path = self.adapter_path(name)
        with disk_errors("remove an adapter"):
            self._drop(path)
        if self._hot is not None:
            self._hot.remove(name)  # last, so that a copy in progress finds that its source has gone

    # What a server keeps outside the store, from which others may delete

    def kept(self) -> list[str]:
        """The names of all adapters and videos that this server keeps outside the store: in memory."""
        return [] if self._hot is None else [name for name in self._hot.names() if _NAME.fullmatch(name)]

    def forget_adapter(self, name: str) -> None:
        """Drop what is kept outside the store of an adapter that was or will be deleted."""
        if self._hot is not None:
            self._hot.remove(name)

    def forget_video(self, video: str) -> None:
        """Drop what is kept outside the store of a video whose bytes were or will be deleted."""

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
        """The path of the adapter in the data folder, found sound. Raises as `verify_adapter` does."""
        path = self.adapter_path(name)
        self._manifests.check(path, name)
        return path

    def _put_far(self, directory: Path, name: str) -> None:
        """Store an adapter remotely, before it is put into place here. A local store does nothing."""

    def _confirm_far(self, name: str) -> None:
        """Make sure that an adapter that was already here is also stored remotely. A local store does nothing."""

    def _drop(self, path: Path) -> None:
        """Move a file or directory out of the data folder in one step, then delete its bytes."""
        self._manifests.forget(path)
        try:
            grave = self.temporary()
        except StoreUnavailable as error:
            if not error.full:
                raise
            # There is no room to move it: remove the manifest first, so that the rest does not count as an adapter.
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
        """A fresh path; whatever is there is removed afterwards."""
        work = self.temporary()
        try:
            yield work
        finally:
            remove(work)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:  # gone meanwhile
        return time.time()
