"""`f2l-vllm adopt`: from now on files are answered by the servers that wait with other models."""

from __future__ import annotations

from pathlib import Path

import typer

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.settings import Settings


def adopt(revision: str | None, database_url: str | None, home: Path | None) -> None:
    """Appoint a revision.

    Args:
        revision: that of waiting servers; None: there is only one.

    Raises:
        ValueError: no server waits with it, or several revisions wait and none is named.
        Unavailable: the catalog cannot be used now.
    """
    given = {"F2L_DATABASE_URL": database_url, "F2L_HOME": home}
    catalog = Catalog(
        Settings.read({name: str(value) for name, value in given.items() if value is not None}).catalog_url
    )
    try:
        present, running = catalog.revisions()
        waiting = {name: count for name, count in running.items() if name != present}
        shown = ", ".join(f"{name} ({count} servers)" for name, count in waiting.items())
        if not waiting:
            raise ValueError("no server waits with other models: start one beside the others, then call this again")
        if revision is None and len(waiting) > 1:
            raise ValueError(f"servers of several revisions wait: name one of {shown}")
        chosen = revision or next(iter(waiting))
        if chosen not in waiting:
            raise ValueError(f"no server waits with {chosen}, but with {shown}")
        catalog.appoint(chosen)
    finally:
        catalog.close()
    typer.echo(f"{waiting[chosen]} servers with {chosen} answer from now on.")
    if left := running.get(present or "", 0):
        typer.echo(f"{left} servers with {present} answer no more: stop them.")
