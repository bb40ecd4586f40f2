"""`f2l-vllm keys`: the API keys of all servers of a catalog that run with `--tenants catalog`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from f2l_vllm.catalog.catalog import Catalog
    from f2l_vllm.catalog.tables import KeyRecord

app = typer.Typer(help="Add, list and revoke the API keys of servers with --tenants catalog.", no_args_is_help=True)

_WAIT_SECONDS = 90.0  # longer than the time after which a silent server counts as gone
_TICK_SECONDS = 0.05
_SHORT = 8  # digits of a hash by which people name a key

DatabaseUrl = Annotated[str | None, typer.Option(help="The servers' catalog (F2L_DATABASE_URL).")]
Home = Annotated[Path | None, typer.Option(help="The servers' data folder (F2L_HOME), without a database.")]


@app.command()
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; files belong to tenants.")],
    label: Annotated[str, typer.Option(help="What the list calls it.")] = "",
    database_url: DatabaseUrl = None,
    home: Home = None,
) -> None:
    """Print a new key. It is shown this once, and works within about a second."""
    from f2l_vllm.catalog.tables import LONGEST_LABEL, LONGEST_TENANT

    if not (0 < len(tenant) <= LONGEST_TENANT and tenant.isprintable()):
        raise typer.BadParameter(f"a tenant's name has 1 to {LONGEST_TENANT} printable characters, got {tenant!r}")
    if not (len(label) <= LONGEST_LABEL and label.isprintable()):
        raise typer.BadParameter(f"a label has at most {LONGEST_LABEL} printable characters, got {label!r}")
    with _catalog(database_url, home, create=True) as catalog:
        key = catalog.add_key(tenant, label)
    typer.echo(key)
    typer.echo("Keep it: the catalog has only its hash.", err=True)


@app.command("list")
def list_(database_url: DatabaseUrl = None, home: Home = None) -> None:
    """Show all keys: the first digits of a key's SHA-256, its tenant, when it was made, its label."""
    with _catalog(database_url, home) as catalog:
        found = catalog.api_keys()
    if not found:
        typer.echo("The catalog has no keys: f2l-vllm keys add TENANT makes one.", err=True)
    width = max((len(key.tenant) for key in found), default=0)
    for key in found:
        typer.echo(f"{key.sha256[:_SHORT]}  {key.tenant:{width}}  {_moment(key)}  {key.label}".rstrip())


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key, 8 or more first digits of its SHA-256, or its label.")],
    database_url: DatabaseUrl = None,
    home: Home = None,
) -> None:
    """Make a key invalid, and wait until every server refuses it."""
    with _catalog(database_url, home) as catalog:
        chosen = _chosen(catalog.api_keys(), key)
        number = catalog.revoke_key(chosen.sha256)
        shown = f"{chosen.sha256[:_SHORT]} of {chosen.tenant}"
        if number is None:
            raise typer.BadParameter(f"the key {shown} was revoked by another command a moment ago")
        silent = _unaware(catalog, number)
    if silent:
        typer.echo(f"The key {shown} is revoked, but not known yet to {', '.join(silent)}.", err=True)
        raise typer.Exit(1)
    typer.echo(f"The key {shown} is revoked: every server refuses it.")


@contextmanager
def _catalog(database_url: str | None, home: Path | None, *, create: bool = False) -> Iterator[Catalog]:
    """The catalog; `create`: in a new data folder, if need be."""
    from f2l_vllm.catalog.catalog import Catalog
    from f2l_vllm.settings import Settings
    from f2l_vllm.store.errors import Unavailable

    given = {"F2L_DATABASE_URL": database_url, "F2L_HOME": home}
    try:
        settings = Settings.read({name: str(value) for name, value in given.items() if value is not None})
        if create and settings.database_url is None:
            settings.data_folder.mkdir(parents=True, exist_ok=True)
        catalog = Catalog(settings.catalog_url)
        try:
            yield catalog
        finally:
            catalog.close()
    except (ValueError, OSError, Unavailable) as error:
        raise typer.BadParameter(str(error)) from error


def _chosen(keys: list[KeyRecord], given: str) -> KeyRecord:
    from f2l_vllm.catalog.keys import key_hash

    digits, sha256 = given.lower(), key_hash(given)
    found = [
        key
        for key in keys
        if key.sha256 == sha256 or (len(digits) >= _SHORT and key.sha256.startswith(digits)) or key.label == given != ""
    ]
    if not found:
        raise ValueError("no such key: name it by itself, 8 or more digits of f2l-vllm keys list, or its label")
    if len(found) > 1:
        shown = ", ".join(f"{key.sha256[: 2 * _SHORT]} ({key.tenant}, {_moment(key)})" for key in found)
        raise ValueError(f"{len(found)} keys are called {given!r}: give the digits of one of {shown}")
    return found[0]


def _unaware(catalog: Catalog, number: int) -> list[str]:
    """The servers that have still not heard of a revocation when the time is up."""
    from f2l_vllm.store.errors import Unavailable

    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            silent = catalog.unaware(number)
        except Unavailable as error:
            silent = [f"servers that cannot be asked about: {error}"]
        if not silent or time.monotonic() > deadline:
            return silent
        time.sleep(_TICK_SECONDS)


def _moment(key: KeyRecord) -> str:
    return f"{datetime.fromtimestamp(key.created_at, UTC):%Y-%m-%d %H:%M}"
