"""Files that commands write: whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in the place of the one that may be there; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
