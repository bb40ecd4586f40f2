"""The remote store: an object store, or any other file system that fsspec reaches by URL.

Its objects::

    videos/<2 hex>/<sha256>.<generation>
    adapters/<name>/<file>, and last adapters/<name>/manifest.json

Object stores have no rename, so a partial copy may be there. It is never taken for a whole one: an adapter counts only
with its manifest, which is written last, and everything is compared with its hash when it is fetched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import split_protocol

from f2l_vllm.store.errors import StoreUnavailable, disk_errors
from f2l_vllm.store.manifest import MANIFEST_FILE

# s3fs asks S3 that does not answer five times, and gives up after a minute. By default botocore asks five times at each
# of these, which takes seven minutes, and waits six times as long for a connection.
_S3: dict[str, Any] = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 10, "retries": {"max_attempts": 0}}}
_OPTIONS: dict[str, dict[str, Any]] = {"file": {"auto_mkdir": True}, "local": {"auto_mkdir": True}, "s3": _S3}
# None of these limits covers a file on its way to S3: aiohttp waits without end for leave to send, and while it sends.
_PUT_SECONDS, _PUT_BYTES_PER_SECOND = 60.0, 1e6


class Remote:
    """One URL, such as `s3://bucket/prefix`.

    Every method raises `StoreUnavailable` when the store does not answer or refuses. Methods that fetch raise
    `FileNotFoundError` for missing objects.

    Raises:
        ValueError: fsspec does not know this kind of URL, or the package for it is not installed.
    """

    def __init__(self, url: str) -> None:
        protocol = split_protocol(url)[0] or "file"
        try:
            # A cached listing would hide what other processes write.
            options = _OPTIONS.get(protocol, {})
            self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(f"F2L_STORE={url}: {error}") from error
        self.url = url

    def put_video(self, source: Path, video: str) -> None:
        """Store a video's bytes."""
        with self._translated("keep a video"):
            self._put(source, self._video(video))

    def get_video(self, video: str, target: Path) -> None:
        """Copy a video's bytes into a file; the caller has to check them."""
        with self._translated("read a video"):
            self._files.get_file(self._video(video), str(target))

    def remove_video(self, video: str) -> None:
        """Remove the bytes; nothing happens if they are already gone."""
        with self._translated("remove a video"):
            self._remove_file(self._video(video))

    def video_size(self, video: str) -> int | None:
        """The length of the object of this name; None if it is not there."""
        with self._translated("look for a video"):
            return self._size(self._video(video))

    def put_adapter(self, directory: Path, name: str) -> None:
        """Store an adapter's files, with the manifest last."""
        with self._translated("keep an adapter"):
            files = sorted(path for path in directory.iterdir() if path.name != MANIFEST_FILE)
            for path in [*files, directory / MANIFEST_FILE]:
                self._put(path, f"{self._adapter(name)}/{path.name}")

    def get_adapter_file(self, name: str, file: str, target: Path) -> None:
        """Copy one of an adapter's files; the caller has to check it."""
        with self._translated("read an adapter"):
            self._files.get_file(f"{self._adapter(name)}/{file}", str(target))

    def has_adapter(self, name: str) -> bool:
        """Whether the adapter's manifest is there."""
        with self._translated("look for an adapter"):
            return self._size(f"{self._adapter(name)}/{MANIFEST_FILE}") is not None

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter, its manifest first, so that a partly removed adapter does not count as one."""
        with self._translated("remove an adapter"):
            self._remove_file(f"{self._adapter(name)}/{MANIFEST_FILE}")
            try:
                if not self._files.async_impl:  # it has directories
                    self._files.rm(self._adapter(name), recursive=True)
                elif found := self._files.find(self._adapter(name)):
                    self._files.rm(found)  # `recursive` would ask twice more what is there
            except FileNotFoundError:
                return

    def sweep(self, named: Callable[[Collection[str]], Collection[str]], older_than_s: float) -> None:
        """Remove what nobody refers to, as `Store.sweep` does."""
        limit = time.time() - older_than_s
        with self._translated("list what is stored"):
            for kind, forget in (("adapters", self.remove_adapter), ("videos", self.remove_video)):
                newest: dict[str, float] = {}
                for path, entry in self._files.find(f"{self._root}/{kind}", detail=True).items():
                    name = path.removeprefix(f"{self._root}/{kind}/").split("/")[0 if kind == "adapters" else -1]
                    newest[name] = max(newest.get(name, 0.0), _written(entry))
                old = [name for name, written in newest.items() if written < limit]
                for name in set(old).difference(named(old)):
                    forget(name)

    def _video(self, video: str) -> str:
        return f"{self._root}/videos/{video[:2]}/{video}"

    def _adapter(self, name: str) -> str:
        return f"{self._root}/adapters/{name}"

    def _put(self, source: Path, path: str) -> None:
        seconds = _PUT_SECONDS + source.stat().st_size / _PUT_BYTES_PER_SECOND
        limit = {"timeout": seconds} if self._files.async_impl else {}
        try:
            self._files.put_file(str(source), path, **limit)
        except FileNotFoundError as error:  # a store of folders: another attempt at it was cleared away at this moment
            raise StoreUnavailable(f"{path} was removed from the store while it was written") from error

    def _size(self, path: str) -> int | None:
        try:
            size: int = self._files.info(path)["size"]
        except FileNotFoundError:
            return None
        return size

    def _remove_file(self, path: str) -> None:
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            return

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            with disk_errors(what):
                yield
        except (FileNotFoundError, StoreUnavailable):
            raise
        except Exception as error:  # each kind of store has its own errors
            why = "it did not answer in time" if isinstance(error, TimeoutError) else error
            message = f"the store at {self._files.unstrip_protocol(self._root)} did not let this server {what}: {why}"
            raise StoreUnavailable(message) from error


def check_url(url: str) -> None:
    """Check that this kind of store is supported, without contacting the store.

    Raises:
        ValueError: as in `Remote`.
    """
    try:
        fsspec.get_filesystem_class(split_protocol(url)[0] or "file")
    except (ImportError, ValueError) as error:
        raise ValueError(f"F2L_STORE={url}: {error}") from error


def _written(entry: dict[str, Any]) -> float:
    """When an object was written, in Unix seconds. Now if the store does not say, so that the object is kept."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        moment = entry.get(key)
        if moment is not None:
            return float(moment) if isinstance(moment, int | float) else float(moment.timestamp())
    return time.time()
