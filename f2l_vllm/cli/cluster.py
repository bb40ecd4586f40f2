"""`f2l-vllm cluster`: several engines, fronts and hypernetwork workers as one service of Ray Serve."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from f2l_vllm.cli.cluster_service import connected, console, start, stop
from f2l_vllm.cli.options import DEFAULT_MODEL, sets
from f2l_vllm.settings import Settings

if TYPE_CHECKING:
    from f2l_vllm.cluster.state import State

app = typer.Typer(help="Start, show and stop several engines as one service of Ray Serve.", no_args_is_help=True)

Home = Annotated[Path | None, sets("home")]
Address = Annotated[
    str | None, typer.Option(help="A running Ray cluster, host:port of its head; default: one of this machine's own.")
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="As for serve; its flags may follow, for every engine.")] = DEFAULT_MODEL,
    engines: Annotated[int, typer.Option(min=1, help="Engines: each a server, with a GPU of its own if any.")] = 2,
    fronts: Annotated[int, typer.Option(min=1, help="Processes that relay requests to them.")] = 2,
    workers: Annotated[int, typer.Option(min=0, help="Most hypernetwork workers; they come with videos.")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    config: Annotated[
        Path | None,
        typer.Option(help="A Serve config like launch/cluster.yaml, instead of all this.", exists=True, dir_okay=False),
    ] = None,
    home: Home = None,
    address: Address = None,
    seconds: Annotated[float, typer.Option("--timeout", min=1, help="Longest to wait until it is ready.")] = 900.0,
) -> None:
    """Start the service, and wait until it is ready."""
    import yaml

    from f2l_vllm.cli import gpus
    from f2l_vllm.cluster import local

    if config is not None:
        wanted: dict[str, Any] = yaml.safe_load(config.read_text())
    else:
        try:
            found = gpus.find().count
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        numbers = {"engines": engines, "fronts": fronts, "workers": workers, "gpus": min(1, found)}
        wanted = local.config(model, context.args, **numbers, host=host, port=port)
    with _failing():
        url = start(wanted, _folder(home), address, seconds)
    console.print(f"ready: {url}/v1 (f2l-vllm cluster status, f2l-vllm cluster down)", highlight=False)


@app.command("status")
def show(home: Home = None, address: Address = None) -> None:
    """Show fronts, engines, workers, and how many videos wait or are in work."""
    with _failing(), connected(_address(home, address)):
        from f2l_vllm.cluster.state import state

        found = state()
    console.print(_table(found))
    for name, kinds in found.replicas.items():
        shown = ", ".join(f"{count} {kind.lower()}" for kind, count in kinds.items()) or "none"
        console.print(f"{name}: {shown}", highlight=False)
    console.print(f"videos waiting or in work: {found.videos}", highlight=False)
    console.print(f"metrics of Ray: {', '.join(found.metrics)}", highlight=False, soft_wrap=True)


@app.command()
def down(home: Home = None, address: Address = None) -> None:
    """Let answers that have begun end, then stop the service, and Ray if `up` started it."""
    with _failing():
        stop(_address(home, address), _folder(home))
    console.print("stopped")


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="As for serve.")] = DEFAULT_MODEL,
    videos: Annotated[int, typer.Option(min=2, help="How many are made and uploaded.")] = 6,
) -> None:
    """Two engines, two fronts and a worker: upload videos, ask, kill an engine, ask on, stop everything."""
    from f2l_vllm.cli.cluster_demo import run

    with _failing():
        run(model, videos)


def _folder(home: Path | None) -> Path:
    return Settings.read({} if home is None else {"F2L_HOME": str(home)}).data_folder


def _address(home: Path | None, address: str | None) -> str:
    from f2l_vllm.cluster.local import Node, environment

    if address is not None:
        return address
    folder = _folder(home)
    if (node := Node.find(folder)) is None:
        raise typer.BadParameter(f"no cluster of {folder} runs: f2l-vllm cluster up starts one; or give --address")
    os.environ.update(environment(folder, "127.0.0.1"))
    return node.address


@contextmanager
def _failing() -> Iterator[None]:
    from f2l_vllm.cluster.local import ClusterFailed

    try:
        yield
    except ClusterFailed as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error}: pip install 'f2l-vllm[cluster]' brings Ray Serve") from error


def _table(found: State) -> Table:
    table = Table(title="engines")
    table.add_column("name")
    table.add_column("address")
    for name in ("running", "waiting", "adapters"):
        table.add_column(name, justify="right")
    for name, one in found.engines.items():
        figures = ["no answer" if one.running is None else str(one.running)]
        figures += ["" if value is None else str(value) for value in (one.waiting, one.adapters)]
        table.add_row(name, one.url, *figures)
    return table
