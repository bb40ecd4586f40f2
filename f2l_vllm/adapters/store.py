"""Videos and adapters on disk: content-addressed, immutable, and either wholly there or not at all.

Layout under `F2L_HOME`::

    videos/<2 hex>/<sha256>          the bytes as uploaded, one copy however many file ids share them
    adapters/<name>/                 PEFT files and manifest.json (sizes and sha-256 of each file)
    tmp/                             work in progress

Everything is written under `tmp/`, synced, and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from f2l_vllm.hypernetwork.files import sync

MANIFEST_FILE = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")


class StoreError(RuntimeError):
    """A stored object that is missing or not what was written."""


class Store:
    """One data folder on a local file system, shared by the server and its workers."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._videos, self._adapters, self._tmp = home / "videos", home / "adapters", home / "tmp"
        for folder in (self._videos, self._adapters, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)

    def sweep(self, keep: Callable[[str], bool], older_than_s: float = 3600.0) -> None:
        """Remove what an interrupted process left: work in progress, and what nobody refers to.

        Args:
            keep: whether anything refers to this adapter name, or to the video with this sha-256.
            older_than_s: younger entries may be in the making, and stay.
        """
        limit = time.time() - older_than_s
        for entry in self._tmp.iterdir():
            if _changed(entry) < limit:
                _remove(entry)
        for entry in [*self._adapters.iterdir(), *self._videos.glob("*/*")]:
            if _changed(entry) < limit and not keep(entry.name):
                _remove(entry)

    def temporary(self) -> Path:
        """A fresh path for work in progress, on the same file system as everything else."""
        return self._tmp / uuid.uuid4().hex

    # Videos

    def video_path(self, sha256: str) -> Path:
        """Where the video with these bytes lies, whether or not it is there."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"not a sha-256: {sha256!r}")
        return self._videos / sha256[:2] / sha256

    def keep_video(self, temporary: Path, sha256: str) -> Path:
        """Move an uploaded file into place; a second copy of the same bytes is dropped."""
        target = self.video_path(sha256)
        target.parent.mkdir(exist_ok=True)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
        return target

    def remove_video(self, sha256: str) -> None:
        """Forget the bytes; nothing happens if they are gone already."""
        self.video_path(sha256).unlink(missing_ok=True)

    # Adapters

    def adapter_path(self, name: str) -> Path:
        """The directory of this adapter, whether or not it is there."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"not an adapter name: {name!r}")
        return self._adapters / name

    def publish_adapter(self, name: str, write: Callable[[Path], None], manifest: dict[str, Any]) -> Path:
        """Let `write` fill a directory, add the manifest, and rename the whole into place.

        The adapter of a name is immutable: if it is there and sound, the new copy is dropped. `write` may raise;
        nothing is left behind then.
        """
        target = self.adapter_path(name)
        work = self.temporary()
        try:
            write(work)
            files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(work.iterdir())}
            (work / MANIFEST_FILE).write_text(json.dumps({**manifest, "name": name, "files": files}, indent=1))
            for file in work.iterdir():
                sync(file)
            sync(work)
            if target.exists():
                try:
                    self.verify_adapter(name)
                    return target
                except StoreError:
                    self.remove_adapter(name)
            os.rename(work, target)
            sync(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return target

    def verify_adapter(self, name: str) -> dict[str, Any]:
        """Check every file against the manifest and return it.

        Raises:
            StoreError: no such adapter, or a file that is missing or differs from what was written.
        """
        directory = self.adapter_path(name)
        try:
            manifest: dict[str, Any] = json.loads((directory / MANIFEST_FILE).read_text())
            for file, entry in manifest["files"].items():
                path = directory / file
                if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                    raise StoreError(f"adapter {name}: {file} differs from what was written")
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"adapter {name} is missing or damaged: {error}") from error
        return manifest

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter in one step (a rename), then its files."""
        grave = self.temporary()
        try:
            os.rename(self.adapter_path(name), grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:  # gone meanwhile
        return time.time()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
