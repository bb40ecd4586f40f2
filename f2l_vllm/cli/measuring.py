"""The options of `f2l-vllm bench` and `f2l-vllm plan`; heavy libraries are imported when one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from f2l_vllm import models
from f2l_vllm.cli.files import Overwrite, keep
from f2l_vllm.cli.options import Hypernetwork

SHAPES = ("tiny", "500m", "2.2b")
_WAYS = "Adapters, KV caches or frames"
_SERVERS = "How many servers"


def bench(
    suite: Annotated[
        str,
        typer.Argument(
            help="latency, amortise, throughput, tax, capacity, ramp, a suite's YAML file, or a result's JSON to show."
        ),
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
    base_url: Annotated[
        str | None, typer.Option(help="Measure this server, which runs already; else servers are started.")
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its API key.")] = "none",
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
    page: Annotated[Path | None, typer.Option(help="Write an HTML file with tables and plots here.")] = None,
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
            {"rounds": rounds, "videos": videos, "serve_flags": serve_flags, "base_url": base_url},
        )
        if suite.endswith(".json"):
            if changes or json_to or resume or not (model is shape is None):
                raise ValueError(f"{suite} is shown as it was measured: only --markdown, --plots and --page go with it")
            keep(markdown_to, plots, page, overwrite=overwrite)
            from f2l_vllm.cli.bench import Shown, again

            return again(Path(suite), Shown(plots, markdown_to, page))
        chosen = load(suite, changes)
        if getattr(chosen, "base_url", None) and not (model is shape is None):
            raise ValueError("a server that runs already has its model: leave out --model and --shape")
        if model is not None:
            models.resolve_hypernetwork(model, hypernetwork)
        elif shape is not None and shape not in SHAPES:
            raise ValueError(f"no shape {shape!r}: give one of {', '.join(SHAPES)}, or any model with --model")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    json_to = json_to or Path(f"{Path(suite).stem}.json")
    ways = "--resume keeps its cells, "
    keep(json_to, overwrite=overwrite or resume, ways=ways)
    keep(markdown_to, plots, page, overwrite=overwrite or resume)
    from f2l_vllm.cli.bench import Shown  # loaded after the options have been checked
    from f2l_vllm.cli.bench import bench as run

    run(chosen, api_key, shape, model, hypernetwork, work, resume, json_to, Shown(plots, markdown_to, page))


def plan(
    videos: Annotated[int, typer.Option(min=1, help="How many videos.")],
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of each video.", rich_help_panel=_WAYS)] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Questions about each video.", rich_help_panel=_WAYS)
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="To keep videos answerable in, GiB.", rich_help_panel=_WAYS)
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Whose tables to read: tiny, 500m (the default), 2.2b.", rich_help_panel=_WAYS),
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            help="Results of 'bench latency' to read instead, of any machine; may be repeated.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_WAYS,
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Longest edge of the videos; the nearest measured is read.", rich_help_panel=_WAYS),
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(help="Numbers of servers to simulate, by comma.", rich_help_panel=_SERVERS)
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, help="Questions a second; default: as many as they answer.", rich_help_panel=_SERVERS),
    ] = None,
    zipf: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The n-th most popular video is asked about as often as 1 / n ** ZIPF; 0: all alike; default: 0.9.",
            rich_help_panel=_SERVERS,
        ),
    ] = None,
    places: Annotated[
        int | None,
        typer.Option(min=1, help="--max-cpu-loras of a server; default: 256.", rich_help_panel=_SERVERS),
    ] = None,
    copies: Annotated[
        int | None, typer.Option(min=0, help="Adapters on a server's disk; default: 2000.", rich_help_panel=_SERVERS)
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="--max-num-seqs of a server; default: 32.", rich_help_panel=_SERVERS)
    ] = None,
    first_token_ms: Annotated[
        float | None,
        typer.Option(min=0, help="To the first token, adapter in memory; default: 60.", rich_help_panel=_SERVERS),
    ] = None,
    answer_ms: Annotated[
        float | None, typer.Option(min=0, help="To the last token; default: 360.", rich_help_panel=_SERVERS)
    ] = None,
    load_ms: Annotated[
        float | None, typer.Option(min=0, help="Of an adapter into memory; default: 1.", rich_help_panel=_SERVERS)
    ] = None,
    fetch_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Of an adapter from the object store; default: 50.", rich_help_panel=_SERVERS),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(help="By comma: least-loaded, haproxy, warm-first; default: all.", rich_help_panel=_SERVERS),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each, with other questions; default: 3.", rich_help_panel=_SERVERS),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of an engine for an hour.", rich_help_panel=_SERVERS)
    ] = None,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the plan here.", dir_okay=False)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say from measured tables which is cheapest: adapters, KV caches, or the frames in context; show the sums. With
    --replicas, say from a simulation how many servers it takes."""
    ways: dict[str, object] = {"frames": frames, "questions": questions, "memory": memory, "shape": shape}
    ways |= {"measured": measured or None, "resolution": resolution}
    counts = {"rate": rate, "zipf": zipf, "places": places, "copies": copies, "concurrency": concurrency}
    milliseconds = {"first-token": first_token_ms, "answer": answer_ms, "load": load_ms, "fetch": fetch_ms}
    of_servers: dict[str, object] = {"policies": policies, "seeds": seeds, "price": price, **counts}
    of_servers |= {f"{name}-ms": value for name, value in milliseconds.items()}
    for name, value in (of_servers if replicas is None else ways).items():
        if value is not None:
            other = "goes with" if replicas is None else "does not go with"
            raise typer.BadParameter(f"--{name} {other} --replicas")
    keep(json_to, overwrite=overwrite)
    if replicas is not None:
        from f2l_vllm.cli.replicas import plan as simulate

        fields = {f"{name.replace('-', '_')}_s": ms / 1e3 for name, ms in milliseconds.items() if ms is not None}
        fields |= {name: value for name, value in counts.items() if value is not None}
        simulate(replicas, {"videos": videos, **fields}, policies, seeds or 3, price, json_to)
        return
    if frames is None or questions is None or memory is None:
        raise typer.BadParameter("give --frames, --questions and --memory, or --replicas for how many servers")
    from f2l_vllm.bench.planner import Need
    from f2l_vllm.cli.plan import plan as run

    run(Need(frames, questions, videos, memory * 2**30), shape or "500m", measured or [], resolution, json_to)
