"""The options of `f2l-vllm bench` and `f2l-vllm plan`; heavy libraries are imported when one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from f2l_vllm import models
from f2l_vllm.cli.files import Overwrite, keep
from f2l_vllm.cli.options import Hypernetwork

SHAPES = ("tiny", "500m", "2.2b")


def bench(
    suite: Annotated[
        str, typer.Argument(help="latency, amortise, throughput, tax, capacity, or the path of a suite's YAML file.")
    ],
    json_to: Annotated[
        Path | None,
        typer.Option("--json", help="Write the results here, after every cell; default: SUITE.json.", dir_okay=False),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="tiny (the default), or random weights of a released shape: 500m, 2.2b.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Any other model: directory or hub id.")] = None,
    hypernetwork: Hypernetwork = None,
    arms: Annotated[str | None, typer.Option(help="Ways of answering, by comma.")] = None,
    frames: Annotated[str | None, typer.Option(help="Frames of the videos, by comma.")] = None,
    resolution: Annotated[str | None, typer.Option(help="Longest edges of the files, pixels, by comma.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Times that all arms are measured.")] = None,
    videos: Annotated[int | None, typer.Option(min=1, help="How many videos (throughput).")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Questions in work at a time, by comma (throughput).")] = None,
    streams: Annotated[str | None, typer.Option(help="Streams at a time, by comma (tax).")] = None,
    adapters: Annotated[str | None, typer.Option(help="Numbers of adapters, by comma; 0: no LoRA (tax).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other key of the suite: key=value, the value as YAML.")
    ] = None,
    serve_flags: Annotated[str | None, typer.Option(help="More flags for every server, in quotes.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for models, videos and servers' data, kept; default: temporary.", file_okay=False),
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the cells that are in the JSON file.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.", file_okay=False)] = None,
    markdown_to: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
) -> None:
    """Measure adapters against frames in context, on real servers: latency, throughput, memory, what LoRA costs."""
    from f2l_vllm.bench.suite import load, parse_changes

    if shape is not None and model is not None:
        raise typer.BadParameter("a shape is a model already: give --shape or --model")
    if model is None and hypernetwork is not None:
        raise typer.BadParameter("a shape has a hypernetwork of its own: give --hypernetwork with --model")
    try:
        changes = parse_changes(
            set_ or [],
            {"arms": arms, "frames": frames, "resolution": resolution, "concurrency": concurrency}
            | {"streams": streams, "adapters": adapters},
            {"rounds": rounds, "videos": videos, "serve_flags": serve_flags},
        )
        chosen = load(suite, changes)
        if model is not None:
            models.resolve_hypernetwork(model, hypernetwork)
        elif shape is not None and shape not in SHAPES:
            raise ValueError(f"no shape {shape!r}: give one of {', '.join(SHAPES)}, or any model with --model")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    json_to = json_to or Path(f"{Path(suite).stem}.json")
    ways = "--resume keeps its cells, "
    keep(json_to, overwrite=overwrite or resume, ways=ways)
    keep(markdown_to, plots, overwrite=overwrite or resume)
    from f2l_vllm.cli.bench import bench as run  # loaded after the options have been checked

    run(chosen, shape, model, hypernetwork, work, resume, json_to, plots, markdown_to)


def plan(
    frames: Annotated[int, typer.Option(min=1, help="Frames of each video.")],
    questions: Annotated[int, typer.Option(min=1, help="Questions about each video.")],
    videos: Annotated[int, typer.Option(min=1, help="How many videos.")],
    memory: Annotated[float, typer.Option(min=0.001, help="To keep videos answerable in, GiB.")],
    shape: Annotated[str, typer.Option(help="Whose tables to read: tiny, 500m, 2.2b.")] = "500m",
    measured: Annotated[
        list[Path] | None,
        typer.Option(help="Results of 'bench latency' to read instead; may be repeated.", exists=True, dir_okay=False),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Longest edge of the videos; the nearest measured is read.")
    ] = None,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the plan here.", dir_okay=False)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say from measured tables which is cheapest: adapters, KV caches, or the frames in context; show the sums."""
    keep(json_to, overwrite=overwrite)
    from f2l_vllm.bench.planner import Need
    from f2l_vllm.cli.plan import plan as run

    run(Need(frames, questions, videos, memory * 2**30), shape, measured or [], resolution, json_to)
