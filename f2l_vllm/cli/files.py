"""Files that commands write; a result is only replaced on request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")]


def keep(*results: Path | None, overwrite: bool, ways: str = "") -> None:
    """Refuse to replace a file, or a folder that is not empty.

    Args:
        ways: alternatives to --overwrite for the message, ending with a comma.

    Raises:
        typer.BadParameter: a result exists, and `overwrite` is False.
    """
    for path in results:
        if path is None or overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
            continue
        raise typer.BadParameter(f"{path} is there already: {ways}--overwrite replaces it, or name another")
