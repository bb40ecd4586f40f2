"""A data folder on a disk that a test can fill up or make read-only, for real, as the processes it starts see it."""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_FS, _CLONE_NEWNS = 0x00000200, 0x00020000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1
_SMALL_FILE = 4096  # smaller than any adapter's weights

T = TypeVar("T")


class Disk:
    """What is run by `run` sees `folder` as this disk; everybody else sees the same files under `seen`."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.seen = folder
        folder.mkdir()
        # One thread starts all processes: its view of mounts and its rights are theirs, and not the other threads'.
        self._thread = ThreadPoolExecutor(1)
        self.run(self._begin)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call it where the disk is as it is."""
        return self._thread.submit(function, *args).result()

    def close(self) -> None:
        """Nothing else runs here any more."""
        self._thread.shutdown()

    def _begin(self) -> None:
        raise NotImplementedError

    @contextmanager
    def full(self, pids: Collection[int]) -> Iterator[None]:
        """No room is left for these processes, which write here."""
        raise NotImplementedError

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written, until the block ends."""
        raise NotImplementedError


class MountedDisk(Disk):
    """A file system in memory, mounted for the processes started here only."""

    BYTES = 64 << 20

    def _begin(self) -> None:
        _check(_libc.unshare(_CLONE_FS | _CLONE_NEWNS))
        _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        _mount("tmpfs", self.folder, "tmpfs", 0, f"size={self.BYTES}")
        self.seen = Path(f"/proc/self/task/{threading.get_native_id()}/root/{self.folder}")

    @contextmanager
    def full(self, pids: Collection[int]) -> Iterator[None]:
        filler = self.seen / "filler"
        with filler.open("wb", buffering=0) as stream, suppress(OSError):
            for size in (1 << 20, 4096, 1):
                with suppress(OSError):
                    while True:
                        stream.write(b"\0" * size)
        try:
            yield
        finally:
            filler.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        def begin() -> None:
            _mount(self.folder, self.folder, None, _MS_BIND)
            _mount("none", self.folder, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY)

        self.run(begin)
        try:
            yield
        finally:
            self.run(lambda: _check(_libc.umount2(os.fsencode(self.folder), 2)))  # MNT_DETACH


class LimitedDisk(Disk):
    """Where nothing may be mounted: a folder whose users may write no large files, or have no right to write."""

    def _begin(self) -> None:
        if os.getuid() == 0:  # permissions bind root only without this capability
            _check(_libc.prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0))

    @contextmanager
    def full(self, pids: Collection[int]) -> Iterator[None]:
        limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
        for pid, (_, hard) in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (_SMALL_FILE, hard))
        try:
            yield
        finally:
            for pid, limit in limits.items():
                with suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        folders = [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folders}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        try:
            yield
        finally:
            for path, mode in modes.items():
                with suppress(FileNotFoundError):
                    path.chmod(mode)


def open_disk(folder: Path) -> Disk:
    """A mounted one where that is permitted."""
    try:
        return MountedDisk(folder)
    except PermissionError:
        folder.rmdir()
        return LimitedDisk(folder)


def _mount(source: str | Path, target: str | Path, kind: str | None, flags: int, options: str = "") -> None:
    encoded = None if kind is None else kind.encode()
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), encoded, flags, options.encode() or None))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
