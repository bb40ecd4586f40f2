"""The options of `f2l-vllm serve` and `f2l-vllm doctor`: the same, because `doctor` says whether `serve` would work."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from f2l_vllm.cli.options import (
    DEFAULT_MODEL,
    ChunkFrames,
    ChunkSeconds,
    Fps,
    Hypernetwork,
    MaxChunks,
    MaxFrames,
    MergeRate,
)

if TYPE_CHECKING:
    from f2l_vllm.cli.serve import Launch

_SERVE = """Start Ray, the hypernetwork workers and vLLM's OpenAI server.

Every flag of `vllm serve` may be given, too: --help=all lists them, --help=WORD those with a word in their name. The
first to know are below.
"""
_DOCTOR = "Say what is installed, which device there is, and whether `serve` with the same flags would start."
_VLLM = "Of vLLM, and any other of its flags (--help=all)"


class _Command(TyperCommand):
    """Lets vLLM explain its own flags, and takes several words after `--api-key`, as vLLM does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for word in args:
            if word.startswith("--help="):
                vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", word]
                os.execvpe(vllm[0], vllm, {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"})
        return super().parse_args(ctx, _repeated(args, "--api-key"))


def _repeated(args: list[str], flag: str) -> list[str]:
    """`--flag a b` as `--flag a --flag b`."""
    words: list[str] = []
    inside = False
    for index, word in enumerate(args):
        if inside and not word.startswith("-") and args[index - 1] != flag:
            words.append(flag)
        inside = word == flag or (inside and not word.startswith("-"))
        words.append(word)
    return words


def _tenants(given: str | None) -> str | None:
    """`catalog`, or an absolute path."""
    if given in (None, "catalog"):
        return given
    path = Path(given)
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {given}; for keys of the catalog give 'catalog'")
    return str(path.absolute())


def _launch(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Shipped model, directory, or hub id.")] = None,
    model_option: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    hypernetwork: Hypernetwork = None,
    hypernetwork_workers: Annotated[int | None, typer.Option(min=0, help="Ray actors that internalize videos.")] = None,
    worker_cpus: Annotated[float | None, typer.Option(min=0, help="CPUs Ray reserves for each worker.")] = None,
    worker_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs, or a fraction, for each worker.")] = None,
    queue_limit: Annotated[int | None, typer.Option(min=1, help="Videos that may wait before queue_full.")] = None,
    max_frames: MaxFrames = None,
    fps: Fps = None,
    chunk_seconds: ChunkSeconds = None,
    chunk_frames: ChunkFrames = None,
    max_chunks: MaxChunks = None,
    merge_rate: MergeRate = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens a pass: internalize waiting videos together.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="Data folder (F2L_HOME).")] = None,
    store: Annotated[
        str | None, typer.Option(help="Where videos and adapters are kept, any fsspec URL; default: the data folder.")
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(help="Catalog in SQLite or PostgreSQL. Others see flags: a password belongs in F2L_DATABASE_URL."),
    ] = None,
    cache_bytes: Annotated[
        int | None, typer.Option(min=0, help="How much of a remote store is kept in the folder; 0: no limit.")
    ] = None,
    hot_bytes: Annotated[
        int | None, typer.Option(min=0, help="Memory (/dev/shm) for the adapters used most; 0: none.")
    ] = None,
    warm_adapters: Annotated[
        int | None, typer.Option(min=0, help="Adapters made resident at start, those used last first.")
    ] = None,
    tenants: Annotated[
        str | None,
        typer.Option(help="catalog: keys of f2l-vllm keys; or a JSON or TOML file of them.", callback=_tenants),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; default: 127.0.0.1.", rich_help_panel=_VLLM)
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen at; default: 8000.", rich_help_panel=_VLLM)
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Keys that clients must send one of. Others see flags: VLLM_API_KEY or --tenants hide them.",
            rich_help_panel=_VLLM,
        ),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error; debug: all that vLLM and Ray say, too.")
    ] = None,
    shutdown_seconds: Annotated[
        float | None, typer.Option(min=0, help="How long open answers may go on when the server is told to stop.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the vllm command and stop.")] = False,
) -> Any:  # a Launch; its module is only imported when needed
    from f2l_vllm.cli.serve import plan
    from f2l_vllm.engine import flags

    given = {
        "F2L_HYPERNETWORK_WORKERS": hypernetwork_workers,
        "F2L_WORKER_CPUS": worker_cpus,
        "F2L_WORKER_GPUS": worker_gpus,
        "F2L_QUEUE_LIMIT": queue_limit,
        "F2L_MAX_FRAMES": max_frames,
        "F2L_FPS": fps,
        "F2L_CHUNK_SECONDS": chunk_seconds,
        "F2L_CHUNK_FRAMES": chunk_frames,
        "F2L_MAX_CHUNKS": max_chunks,
        "F2L_MERGE_RATE": merge_rate,
        "F2L_BATCH_TOKENS": batch_tokens,
        "F2L_HOME": home,
        "F2L_STORE": store,
        "F2L_DATABASE_URL": database_url,
        "F2L_CACHE_BYTES": cache_bytes,
        "F2L_HOT_BYTES": hot_bytes,
        "F2L_SHUTDOWN_SECONDS": shutdown_seconds,
        "F2L_LOG_LEVEL": log_level.lower() if log_level is not None else None,
        "F2L_WARM_ADAPTERS": warm_adapters,
        "F2L_TENANTS": tenants,
    }
    # What click took for the model may be one of vLLM's flags, or its value: click does not know them.
    words = [*([model] if model is not None else []), *context.args]
    own = [name for param in context.command.params for name in param.opts if name.startswith("--")]
    found = flags.read(words, own)
    named = getattr(found, "model_tag", None)
    if named is not None:
        words = flags.without_model(words, named)
    elif model_option is None and hasattr(found, "model"):
        named = found.model  # from the file that --config names
    words += [f"--host={host}"] * (host is not None) + [f"--port={port}"] * (port is not None)
    words += ["--api-key", *api_key] if api_key else []
    chosen = {name: str(value) for name, value in given.items() if value is not None}
    return plan(named or model_option or DEFAULT_MODEL, hypernetwork, chosen, words)


def _serve(context: typer.Context, launch: Callable[[], Launch]) -> None:
    from f2l_vllm.cli.serve import serve

    try:
        started = launch()
        if not context.params["dry_run"]:
            serve(started)
    except ValueError as error:
        raise typer.BadParameter(str(error), context) from error
    typer.echo(" ".join([*(f"{k}={shlex.quote(v)}" for k, v in started.env.items()), shlex.join(started.argv)]))


def _doctor(_context: typer.Context, launch: Callable[[], Launch]) -> None:
    from f2l_vllm.cli.doctor import doctor

    doctor(launch)


def add_to(app: typer.Typer) -> None:
    """Add both commands."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    for name, run, text in (("serve", _serve, _SERVE), ("doctor", _doctor, _DOCTOR)):
        app.command(name, cls=_Command, context_settings=settings, help=text)(_taking_flags(run))


def _taking_flags(run: Callable[[typer.Context, Callable[[], Launch]], None]) -> Callable[..., None]:
    @functools.wraps(_launch)  # its signature is what typer reads
    def command(context: typer.Context, **values: Any) -> None:
        run(context, lambda: _launch(context, **values))

    return command
