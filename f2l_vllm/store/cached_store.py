"""A data folder as a cache of a remote store: everything is kept there, and part of it here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from f2l_vllm.store import manifest as manifests
from f2l_vllm.store.errors import disk_errors
from f2l_vllm.store.manifest import MANIFEST_FILE, StoreError
from f2l_vllm.store.object_store import Remote
from f2l_vllm.store.store import Store

_YOUNG_SECONDS = 60.0  # what was used this recently stays in the cache: somebody may be about to open it


def open_store(
    home: Path,
    *,
    url: str | None = None,
    cache_bytes: int = 0,
    hot_bytes: int = 0,
    reserve_bytes: int | None = None,
) -> Store:
    """The store of a data folder.

    Args:
        home: the data folder.
        url: the remote store, as any fsspec URL; None: the data folder is the store.
        cache_bytes: how much of a remote store is kept in the data folder; 0: no limit.
        hot_bytes, reserve_bytes: as in `Store`.

    Raises:
        ValueError: the URL cannot be used.
    """
    if url is None:
        return Store(home, hot_bytes=hot_bytes, reserve_bytes=reserve_bytes)
    return CachedStore(home, Remote(url), cache_bytes, hot_bytes=hot_bytes, reserve_bytes=reserve_bytes)


class CachedStore(Store):
    """Keeps everything in the remote store, and what is used here also in the data folder. `trim` bounds its bytes.

    Methods also raise `StoreUnavailable` when the remote store is away.
    """

    is_cache = True

    def __init__(
        self, home: Path, remote: Remote, cache_bytes: int = 0, *, hot_bytes: int = 0, reserve_bytes: int | None = None
    ) -> None:
        """`cache_bytes` as in `open_store`."""
        super().__init__(home, hot_bytes=hot_bytes, reserve_bytes=reserve_bytes)
        self._remote = remote
        self._cache_bytes = cache_bytes

    def sweep(
        self, named: Callable[[Collection[str]], Collection[str]], older_than_s: float = 3600.0, *, far: bool = True
    ) -> None:
        """As `Store.sweep`."""
        super().sweep(named, older_than_s)
        if far:
            self._remote.sweep(named, older_than_s)

    def trim(self, videos_in_use: set[str], young_s: float = _YOUNG_SECONDS) -> int:
        """Shrink the cache below its limit and out of the disk's reserve, least recently used entries first. Returns
        the bytes freed.

        Entries in use stay (videos are named by their hashes), and so do entries used within `young_s` seconds, even if
        they exceed the limit.
        """
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

    def keep_video(self, temporary: Path, video: str) -> Path:
        """As `Store.keep_video`; the remote store gets the video before the data folder does."""
        self.reserve.check("keep a video")
        with disk_errors("keep a video"):
            self._remote.put_video(temporary, video)
        return super().keep_video(temporary, video)

    def fetch_video(self, video: str) -> Path:
        """The video's bytes as a local file, fetched and checked if they are not here.

        Raises:
            StoreError: the bytes are missing, or differ from what was uploaded.
        """
        path = self.video_path(video)
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
        """As `Store.has_video`."""
        found = self._remote.video_size(video)
        return found is not None and size in (None, found)

    def remove_video(self, video: str) -> None:
        """As `Store.remove_video`."""
        super().remove_video(video)
        self._remote.remove_video(video)

    def verify_adapter(self, name: str) -> dict[str, Any]:
        """As `Store.verify_adapter`; a damaged copy is fetched again."""
        try:
            manifest = super().verify_adapter(name)
        except StoreError:
            return self._fetch_adapter(name)
        _touch(self.adapter_path(name))
        return manifest

    def remove_adapter(self, name: str) -> None:
        """As `Store.remove_adapter`."""
        super().remove_adapter(name)
        self._remote.remove_adapter(name)

    def kept(self) -> list[str]:
        """As `Store.kept`, including what is on disk."""
        here = [path.name for path in [*self._adapters.iterdir(), *self._videos.glob("*/*")]]
        return [*here, *super().kept()]

    def forget_adapter(self, name: str) -> None:
        """As `Store.forget_adapter`."""
        super().remove_adapter(name)

    def forget_video(self, video: str) -> None:
        """As `Store.forget_video`."""
        super().remove_video(video)

    def _checked(self, name: str) -> Path:
        path = self.adapter_path(name)
        try:
            super()._checked(name)
        except StoreError:
            self._fetch_adapter(name)
        _touch(path)
        return path

    def _put_far(self, directory: Path, name: str) -> None:
        self._remote.put_adapter(directory, name)

    def _confirm_far(self, name: str) -> None:
        if not self._remote.has_adapter(name):
            self._remote.put_adapter(self.adapter_path(name), name)

    def _fetch_adapter(self, name: str) -> dict[str, Any]:
        path = self.adapter_path(name)
        with self._work() as work, disk_errors("keep an adapter"):
            work.mkdir()
            try:
                self._remote.get_adapter_file(name, MANIFEST_FILE, work / MANIFEST_FILE)
                for file in manifests.read(work, name)["files"]:
                    self._remote.get_adapter_file(name, file, work / file)
            except FileNotFoundError as error:
                raise StoreError(f"adapter {name} is missing or damaged: {error}") from error
            manifest = manifests.verify(work, name)
            self._drop(path)
            try:
                os.rename(work, path)
            except OSError:
                manifests.verify(path, name)  # another thread or process fetched it meanwhile
        self._drop_unwanted(name)
        return manifest

    def _drop_unwanted(self, name: str) -> None:
        """What was deleted before it came was already forgotten, so nobody else would remove it."""
        is_wanted = False
        try:
            is_wanted = self._wanted(name)
        finally:
            if not is_wanted:
                self._drop(self.adapter_path(name))
        if not is_wanted:
            raise StoreError(f"adapter {name} was deleted a moment ago")


def _touch(path: Path) -> bool:
    """Note that a cached entry was used. Returns whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _used(path: Path) -> tuple[float, int]:
    """When a cached entry was last used, and its size in bytes."""
    try:
        status = path.stat()
        size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else status.st_size
    except FileNotFoundError:  # gone meanwhile
        return time.time(), 0
    return status.st_mtime, size
