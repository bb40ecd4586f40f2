"""Files that commands write: over a result only when that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")]


def keep(*results: Path | None, overwrite: bool, ways: str = "") -> None:
    """Refuse to write where there is something already: a file, or a folder that holds anything.

    Args:
        ways: what else than --overwrite may be asked for, with a comma behind.

    Raises:
        typer.BadParameter: there is, and `overwrite` is False.
    """
    for path in results:
        if path is None or overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
            continue
        raise typer.BadParameter(f"{path} is there already: {ways}--overwrite replaces it, or name another")
