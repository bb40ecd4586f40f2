"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh directory beside `target`; on success make it durable and rename it to `target`.

    On an exception nothing remains and `target` is untouched.

    Raises:
        FileExistsError: `target` is a file, or a directory that is not empty and `overwrite` is False.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a directory that does not exist yet.")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty; remove it or choose another directory.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    staging.mkdir()
    try:
        yield staging
        for path in staging.iterdir():
            sync(path)
        sync(staging)
        _move_into_place(staging, target, overwrite)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _move_into_place(staging: Path, target: Path, overwrite: bool) -> None:
    try:
        os.rename(staging, target)  # replaces an empty directory
    except OSError:
        if not target.is_dir():
            raise
        if not overwrite:
            raise FileExistsError(f"{target} was written by someone else meanwhile.") from None
        replaced = staging.with_suffix(".replaced")
        os.rename(target, replaced)
        os.rename(staging, target)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a fresh path beside `path`, with the same suffix; on success make the new file durable and let it replace
    `path`. The folder is made; on an exception nothing remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield staging
        sync(staging)
        os.replace(staging, path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file by `atomic_path`."""
    with atomic_path(path) as staging:
        staging.write_text(text, encoding="utf-8")


def lasting_name(path: Path) -> str:
    """The name that this file holds, or a fresh one, written to it. Only one process may do this at a time."""
    if not path.is_file() or not (name := path.read_text(encoding="utf-8").strip()):
        name = uuid.uuid4().hex
        write_whole(path, name)
    return name


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError for a file that is not JSON, or nested deeper than Python reads."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
