"""The options of `f2l-vllm serve`, `doctor` and `workers`. The first two have the same ones, because `doctor` says
whether `serve` would work."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from f2l_vllm.cli.files import Overwrite
from f2l_vllm.cli.options import DEFAULT_MODEL, Hypernetwork, sets
from f2l_vllm.settings import PREFIX, Settings

if TYPE_CHECKING:
    from f2l_vllm.cli.serve import Launch

_SERVE = """Start Ray, the hypernetwork workers and vLLM's OpenAI server.

Settings are variables, too: --max-frames is F2L_MAX_FRAMES. Every flag of `vllm serve` may be given: --help=all lists
them, --help=WORD those with a word in their name. The first to know are below.
"""
_DOCTOR = """Say what is installed, which device there is, and whether `serve` with the same flags would start.

With --gpu-check, compute here, too, and compare with transformers and with the CPU: on a GPU for an hour or more.
"""
_WORKERS = """Read the videos of servers that have no workers: as a program of its own, without a server and an engine.

Give it the servers' catalog and store, and the settings for reading videos that they have. It claims videos from the
catalog. SIGTERM lets it finish those in work, within F2L_JOB_SECONDS; a second one does not.
"""
_TUNE = """Measure how vLLM's LoRA kernels are launched best on this GPU; `serve` then does it.

It takes minutes, for one model, number of slots and rank. What is measured stays in ~/.cache/f2l-vllm/lora-kernels.
"""
_VLLM = "Of vLLM, and any other of its flags (--help=all)"
# The settings that are flags, too, in the order of the help.
_MAKING = ("hypernetwork", "hypernetwork_workers", "worker_cpus", "worker_gpus")
_READING = ("max_frames", "fps", "chunk_seconds", "chunk_frames", "max_chunks", "merge_rate", "batch_tokens")
_FLAGS = (
    *(*_MAKING, "queue_limit", *_READING),
    *("home", "store", "database_url", "cache_bytes", "hot_bytes", "warm_adapters", "tenants"),
    *("console", "log_level", "log_format", "shutdown_seconds", "shutdown_delay_seconds"),
)


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


def _lower(given: str | None) -> str | None:
    return None if given is None else given.lower()


_MORE = {"tenants": {"callback": _tenants}, "log_level": {"callback": _lower}, "log_format": {"callback": _lower}}


def _launch(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Shipped model, directory, or hub id.")] = None,
    model_option: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the vllm command and stop.")] = False,
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
    **settings: Any,
) -> Any:  # a Launch; its module is only imported when needed
    from f2l_vllm.cli.serve import plan
    from f2l_vllm.engine import flags

    # What click took for the model may be one of vLLM's flags, or its value: click does not know them.
    words = [*([model] if model is not None else []), *context.args]
    names = [name for param in context.command.params for name in (*param.opts, *param.secondary_opts)]
    own = [name for name in names if name.startswith("--")]
    found = flags.read(words, own)
    named = getattr(found, "model_tag", None)
    if named is not None:
        words = flags.without_model(words, named)
    elif model_option is None and hasattr(found, "model"):
        named = found.model  # from the file that --config names
    words += [f"--host={host}"] * (host is not None) + [f"--port={port}"] * (port is not None)
    words += ["--api-key", *api_key] if api_key else []
    return plan(named or model_option or DEFAULT_MODEL, _given(settings), words)


def _serve(context: typer.Context, launch: Callable[[], Launch]) -> None:
    from f2l_vllm.cli.serve import serve

    try:
        started = launch()
        if not context.params["dry_run"]:
            serve(started)
    except ValueError as error:
        raise typer.BadParameter(str(error), context) from error
    if unused := started.gpus.unused():
        typer.echo(f"f2l-vllm {context.info_name}: {unused}", err=True)
    typer.echo(" ".join([*(f"{k}={shlex.quote(v)}" for k, v in started.env.items()), shlex.join(started.argv)]))


def _doctor(
    _context: typer.Context,
    launch: Callable[[], Launch],
    gpu_check: Annotated[
        bool, typer.Option("--gpu-check", help="Compare what this machine computes with references, and measure it.")
    ] = False,
    suites: Annotated[
        bool, typer.Option("--suites/--no-suites", help="With --gpu-check: measure what answers and adapters cost.")
    ] = True,
    results: Annotated[
        Path | None,
        typer.Option(help="With --gpu-check: folder to write; default: benchmarks/results/DEVICE.", file_okay=False),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    from f2l_vllm.cli.doctor import doctor

    planned = doctor(launch)
    if gpu_check:
        from f2l_vllm.cli.gpu_check import run

        run(planned, results, overwrite, with_suites=suites)


def _workers(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Shipped model, directory, or hub id: the servers'.")] = DEFAULT_MODEL,
    max_lora_rank: Annotated[int | None, typer.Option(min=1, help="The servers', if they were given one.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at, with --port.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Answer /health, /ready and /metrics; default: nowhere.")
    ] = None,
    **settings: Any,
) -> None:
    from f2l_vllm.cli.workers import plan, run
    from f2l_vllm.store.errors import Unavailable

    try:
        code = run(plan(model, _given(settings), max_lora_rank), host, port)
    except (ValueError, Unavailable) as error:
        raise typer.BadParameter(str(error), context) from error
    raise typer.Exit(code)


def _tune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Shipped model, directory, or hub id: the server's.")] = DEFAULT_MODEL,
    hypernetwork: Hypernetwork = None,
    max_loras: Annotated[int | None, typer.Option(min=1, help="The server's, if it is given one.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(min=1, help="The server's, if it is given one.")] = None,
    overwrite: Overwrite = False,
) -> None:
    from f2l_vllm.cli.tune import tune
    from f2l_vllm.server.inputs import Inputs

    given = {"max_loras": max_loras, "max_lora_rank": max_lora_rank}
    flags = Namespace(**{name: value for name, value in given.items() if value is not None})
    try:
        tune(Inputs.read(model, _given({"hypernetwork": hypernetwork})), flags, overwrite)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error), context) from error


def _given(settings: dict[str, Any]) -> dict[str, str]:
    """Flags as variables."""
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in settings.items() if value is not None}


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    for name, run, text in (("serve", _serve, _SERVE), ("doctor", _doctor, _DOCTOR)):
        app.command(name, cls=_Command, context_settings=settings, help=text)(_launching(run))
    app.command("tune", help=_TUNE)(_tune)
    flags = (*_MAKING, *_READING, "home", "store", "database_url")
    app.command("workers", help=_WORKERS)(_with_flags(lambda **given: _workers(**given), _workers, flags, 2))


def _launching(run: Callable[..., None]) -> Callable[..., None]:
    """`run(context, launch, …)` as a command with the flags of `serve`, and those that `run` has besides."""
    _, _, *own = inspect.signature(run, eval_str=True, locals={"Launch": Any}).parameters.values()

    def command(context: typer.Context, **values: Any) -> None:
        more = {one.name: values.pop(one.name) for one in own}
        run(context, lambda: _launch(context, **values), **more)

    return _with_flags(command, _launch, _FLAGS, 3, own)


def _with_flags(
    command: Callable[..., None],
    options: Callable[..., Any],
    names: Sequence[str],
    before: int,
    more: Sequence[inspect.Parameter] = (),
) -> Callable[..., None]:
    """Give a command the signature of `options`, which is what typer reads, with a flag for each of these settings
    and `more` after the first parameters."""
    *parameters, _ = inspect.signature(options, eval_str=True).parameters.values()
    parameters[before:before] = [*more, *map(_flag, names)]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


def _flag(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    default = None if field.default is None else str(field.default)
    kind: Any = field.annotation
    if any(get_origin(one) is Literal for one in (kind, *get_args(kind))):
        kind = str  # `Settings` says which words
    option = sets(name, show_default=default or False, **_MORE.get(name, {}))
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[kind | None, option]
    )
