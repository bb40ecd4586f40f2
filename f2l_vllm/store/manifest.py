"""An adapter's manifest records what was written, so that it can be compared with what is there.

A directory that was compared once is not read again while the inode, length and times of each file stay the same. This
finds files that were overwritten, replaced, cut short or removed. If a device loses data of a file that nobody wrote
to, the next process that reads the file finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# File times are as coarse as the kernel's tick: a file this young may change again and keep the same times.
_TICK_NS = 20_000_000

_Signature = tuple[tuple[str, int, int, int, int], ...]


class StoreError(RuntimeError):
    """A stored object is missing or differs from what was written."""


class Manifests:
    """Compares directories with their manifests, and remembers which are sound. Thread-safe."""

    def __init__(self) -> None:
        self._sound: dict[Path, _Signature] = {}

    def check(self, directory: Path, name: str) -> None:
        """Compare every file with the manifest, unless that was done and nothing has changed since.

        Raises:
            StoreError: as in `verify`.
        """
        found = _signature(directory)  # before the files are read, so that the next check sees what changes meanwhile
        if found is None or self._sound.get(directory) != found:
            verify(directory, name)
            if found is not None and max(max(entry[3:]) for entry in found) < time.time_ns() - _TICK_NS:
                self._sound[directory] = found
            else:
                self.forget(directory)

    def note(self, directory: Path) -> None:
        """Remember as sound a directory that `copy` just made in a folder that nobody else writes to."""
        found = _signature(directory)
        if found is not None:
            self._sound[directory] = found

    def is_sound(self, directory: Path) -> bool:
        """Whether the directory was compared and has not changed since; reads no file."""
        known = self._sound.get(directory)
        return known is not None and known == _signature(directory)

    def forget(self, directory: Path) -> None:
        """Forget a directory that is about to be removed, or has to be compared again."""
        self._sound.pop(directory, None)


def read(directory: Path, name: str) -> dict[str, Any]:
    """The manifest of the adapter `name`.

    Raises:
        StoreError: there is no manifest, it is damaged, or it is another adapter's.
    """
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST_FILE).read_text())
        if manifest["name"] != name:
            raise StoreError(f"adapter {name}: {manifest['name']} lies in its place")
        if not all(_FILE.fullmatch(file) for file in manifest["files"]):
            raise StoreError(f"adapter {name}: its manifest names files that are none of an adapter's")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"adapter {name} is missing or damaged: {error}") from error
    return manifest


def write(directory: Path, name: str, manifest: dict[str, Any], known: Mapping[str, str] | None = None) -> None:
    """Add a manifest of the files in the directory; `known` has the hashes of files that were already read."""
    known = known or {}
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or sha256_of(path)}
        for path in sorted(directory.iterdir())
    }
    (directory / MANIFEST_FILE).write_text(json.dumps({**manifest, "name": name, "files": files}, indent=1))


def verify(directory: Path, name: str) -> dict[str, Any]:
    """Read every file, compare it with the manifest, and return the manifest.

    Raises:
        StoreError: there is no such adapter, or a file is missing or differs from what was written.
    """
    manifest = read(directory, name)
    try:
        for file, entry in manifest["files"].items():
            path = directory / file
            if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                raise StoreError(f"adapter {name}: {file} differs from what was written")
    except (OSError, KeyError, TypeError) as error:
        raise StoreError(f"adapter {name} is missing or damaged: {error}") from error
    return manifest


def copy(directory: Path, target: Path, name: str) -> None:
    """Copy an adapter into a new directory, and compare each file with the manifest on the way.

    Raises:
        StoreError: there is no such adapter, or a file is missing or differs; a part may have been copied.
        OSError: the copy cannot be written.
    """
    manifest = read(directory, name)
    target.mkdir(mode=0o700)
    shutil.copy2(directory / MANIFEST_FILE, target)
    for file, entry in manifest["files"].items():
        try:
            content = (directory / file).read_bytes()
            is_whole = hashlib.sha256(content).hexdigest() == entry["sha256"]
        except (FileNotFoundError, KeyError, TypeError) as error:
            raise StoreError(f"adapter {name} is missing or damaged: {error}") from error
        if not is_whole:
            raise StoreError(f"adapter {name}: {file} differs from what was written")
        (target / file).write_bytes(content)


def sha256_of(path: Path) -> str:
    """A file's hash, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _signature(directory: Path) -> _Signature | None:
    """Name, inode, length and times of every file in the directory; None if they cannot be read."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return None
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found)) or None
