"""An adapter's manifest: what was written, compared with what is there.

A directory that was compared once and whose files have not changed since is not read again: the inode, length and times
of each file tell. What was overwritten, replaced, cut short or taken away is found; what a device forgets by itself of
a file that nobody wrote to is found by the next process that reads it.
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
# File times are as coarse as the kernel's tick: a file this young may change again and show the same times.
_TICK_NS = 20_000_000

_Signature = tuple[tuple[str, int, int, int, int], ...]


class StoreError(RuntimeError):
    """A stored object that is missing or not what was written."""


class Manifests:
    """Compares directories with their manifests, and remembers which are sound. Safe among threads."""

    def __init__(self) -> None:
        self._sound: dict[Path, _Signature] = {}

    def check(self, directory: Path, name: str) -> None:
        """Compare every file with the manifest, unless that was done and nothing has changed.

        Raises:
            StoreError: as `verify`.
        """
        found = _signature(directory)  # before they are read: what changes meanwhile is seen the next time
        if found is None or self._sound.get(directory) != found:
            verify(directory, name)
            if found is not None and max(max(entry[3:]) for entry in found) < time.time_ns() - _TICK_NS:
                self._sound[directory] = found
            else:
                self.forget(directory)

    def note(self, directory: Path) -> None:
        """It was just made by `copy`, in a folder that nobody else writes to."""
        found = _signature(directory)
        if found is not None:
            self._sound[directory] = found

    def is_sound(self, directory: Path) -> bool:
        """Whether it was compared and has not changed; reads no file."""
        known = self._sound.get(directory)
        return known is not None and known == _signature(directory)

    def forget(self, directory: Path) -> None:
        """It is about to go."""
        self._sound.pop(directory, None)


def read(directory: Path, name: str) -> dict[str, Any]:
    """The manifest of the adapter `name`.

    Raises:
        StoreError: there is none, or it is another adapter's.
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
    """Add the manifest of the files that are there; `known` has the hashes of those that were read already."""
    known = known or {}
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or sha256_of(path)}
        for path in sorted(directory.iterdir())
    }
    (directory / MANIFEST_FILE).write_text(json.dumps({**manifest, "name": name, "files": files}, indent=1))


def verify(directory: Path, name: str) -> dict[str, Any]:
    """Read every file, compare it with the manifest, and return that.

    Raises:
        StoreError: no such adapter, or a file that is missing or differs from what was written.
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
    """Copy an adapter into a new directory, each file compared with the manifest as it goes by.

    Raises:
        StoreError: no such adapter, or a file that is missing or differs from what was written; part of it is copied.
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
    """Name, inode, length and times of every file there; None where they cannot be seen."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return None
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found)) or None
