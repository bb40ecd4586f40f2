"""The command line, `f2l-vllm`. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from f2l_vllm import __version__
from f2l_vllm.commands import measuring, training
from f2l_vllm.commands.manifest import app as manifest_app

app = typer.Typer(
    name="f2l-vllm",
    help="Video answered at text cost: a hypernetwork turns each video into a LoRA adapter that vLLM serves.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

DEFAULT_MODEL = "f2l-tiny"
Model = Annotated[str, typer.Option("--model", help="Shipped model, directory, or hub id.")]
Hypernetwork = Annotated[
    str | None,
    typer.Option("--hypernetwork", help="Directory, released .pt file, or hub id; default: the model's own."),
]

MaxFrames = Annotated[int | None, typer.Option(min=1, help="Frames read of a video or chunk; default: as trained.")]
Fps = Annotated[float | None, typer.Option(min=0.001, help="Frames read per second, up to --max-frames.")]
ChunkSeconds = Annotated[float | None, typer.Option(min=0.001, help="Cut videos into chunks of this many seconds.")]
ChunkFrames = Annotated[int | None, typer.Option(min=1, help="Cut videos into chunks of this many frames.")]
MergeRate = Annotated[
    float | None, typer.Option(help="Part of a video's visual tokens to merge away before it is internalized.")
]
_MAX_CHUNKS = "Most chunks of a video (each adds to the LoRA rank); default: serve 3, internalize 15."
MaxChunks = Annotated[int | None, typer.Option(min=1, help=_MAX_CHUNKS)]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"f2l-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Watch a video once; answer about it for ever, at text-only cost."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Shipped model, directory, or hub id.")] = DEFAULT_MODEL,
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
        Path | None, typer.Option(help="JSON or TOML file of tenants and their API keys.", exists=True, dir_okay=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the vllm command and stop.")] = False,
) -> None:
    """Start Ray, the hypernetwork workers and vLLM's OpenAI server. Any other flag goes to `vllm serve`."""
    import shlex

    from f2l_vllm.commands.serve import plan
    from f2l_vllm.commands.serve import serve as become_server

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
        "F2L_WARM_ADAPTERS": warm_adapters,
        "F2L_TENANTS": tenants.absolute() if tenants is not None else None,
    }
    extra = list(context.args)
    if model.startswith("-"):  # no model named: what stands in its place is a flag for vLLM
        extra.insert(0, model)
        model = DEFAULT_MODEL
    try:
        launch = plan(model, hypernetwork, {k: str(v) for k, v in given.items() if v is not None}, extra)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if dry_run:
        typer.echo(" ".join([*(f"{k}={shlex.quote(v)}" for k, v in launch.env.items()), shlex.join(launch.argv)]))
        return
    become_server(launch)


@app.command()
def internalize(
    video: Annotated[Path, typer.Argument(help="Video file.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the PEFT adapter; must not exist.")],
    model: Model = DEFAULT_MODEL,
    hypernetwork: Hypernetwork = None,
    max_frames: MaxFrames = None,
    fps: Fps = None,
    chunk_seconds: ChunkSeconds = None,
    chunk_frames: ChunkFrames = None,
    max_chunks: MaxChunks = None,
    merge_rate: MergeRate = None,
) -> None:
    """Read a video once and write its LoRA adapter, without a server."""
    from f2l_vllm.commands.local import Reading
    from f2l_vllm.commands.local import internalize as run

    if chunk_seconds is not None and chunk_frames is not None:
        raise typer.BadParameter("videos are cut by seconds or by frames: give one of them")
    reading = Reading(max_frames, fps, chunk_seconds, chunk_frames, max_chunks or 15, merge_rate or 0.0)
    run(video, output, model, hypernetwork, reading)


@app.command()
def ask(
    video: Annotated[Path, typer.Argument(help="Video file.", exists=True, dir_okay=False)],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Model = DEFAULT_MODEL,
    hypernetwork: Hypernetwork = None,
    url: Annotated[
        str | None, typer.Option(help="Ask a running server instead, e.g. http://127.0.0.1:8000/v1.")
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its API key.")] = "none",
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Answer one question about one video from its adapter, with zero visual tokens."""
    from f2l_vllm.commands import local

    if url is not None:
        local.ask_server(video, question, url, api_key, max_tokens)
    else:
        local.ask(video, question, model, hypernetwork, max_tokens)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Released .pt file, directory, or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write; must not exist.")],
    base_model: Annotated[str | None, typer.Option(help="Base model, where the reference holds several.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Round the weights to bf16 (half the size of fp32) or fp32; default: as they are."),
    ] = None,
) -> None:
    """Write a hypernetwork in the safe format: config.json and model.safetensors."""
    from f2l_vllm.commands.local import convert as run

    run(checkpoint, output, base_model, dtype)


@app.command("eval")
def evaluate(
    world: Annotated[
        str | None, typer.Option(help="Fresh videos of the synthetic world: held-out (the default) or train.")
    ] = None,
    videos: Annotated[int, typer.Option(min=1, help="How many videos of the world.")] = 64,
    seed: Annotated[int, typer.Option(help="Which videos and questions of the world.")] = 0,
    phrasing: Annotated[str, typer.Option(help="The world's wordings: seen or unseen in training.")] = "seen",
    manifest: Annotated[
        Path | None, typer.Option(help="JSONL manifest to ask from instead.", exists=True, dir_okay=False)
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split of the manifest.")] = None,
    arms: Annotated[str, typer.Option(help="Ways of answering, by comma.")] = "adapter,frames,none,wrong-video",
    composition: Annotated[bool, typer.Option("--composition", help="Also the video in 1, 2 and 4 chunks.")] = False,
    model: Model = DEFAULT_MODEL,
    hypernetwork: Hypernetwork = None,
    through: Annotated[str, typer.Option(help="Who answers: server or transformers.")] = "server",
    base_url: Annotated[str | None, typer.Option(help="A running server, e.g. http://127.0.0.1:8000/v1.")] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its API key.")] = "none",
    serve_flags: Annotated[str, typer.Option(help="More flags for the server that is started, in quotes.")] = "",
    max_frames: MaxFrames = None,
    merge_rate: Annotated[
        float, typer.Option(help="Part of the visual tokens to merge away, in context and in internalization.")
    ] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; default: 64, manifests 256.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions in work at a time.")] = 8,
    metric: Annotated[
        str | None, typer.Option(help="exact_match, f1 or judge; default: exact_match, manifests judge or f1.")
    ] = None,
    margin: Annotated[float | None, typer.Option(help="Of non-inferiority; default: 0.05, judge 0.15.")] = None,
    equivalence_margin: Annotated[float, typer.Option(help="Of equivalence.")] = 0.05,
    judge_base_url: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint that judges answers.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model.")] = None,
    judge_api_key_env: Annotated[str, typer.Option(help="Variable that holds its API key.")] = "OPENAI_API_KEY",
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for videos and answers, to resume in; default: temporary.", file_okay=False),
    ] = None,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    markdown_to: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also over frames and resolution.")] = False,
    sweep_frames: Annotated[str, typer.Option(help="Numbers of frames, by comma.")] = "4,8,16,32,64",
    sweep_resolutions: Annotated[str, typer.Option(help="Longest edges of the file, by comma.")] = "160,320,640",
    diagnostics: Annotated[bool, typer.Option("--diagnostics", help="Also where in an adapter answers are.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots of all that was measured.")] = None,
    browse: Annotated[Path | None, typer.Option(help="Folder for a page of videos and answers; must be new.")] = None,
) -> None:
    """Say how good answers are: from adapters, from frames in context, from neither, under another video's adapter."""
    import os

    from f2l_vllm.commands.evaluate import Source, run
    from f2l_vllm.commands.evaluation_extras import Extras
    from f2l_vllm.evaluation.setup import JudgeSetup, Setup

    if (judge_base_url is None) != (judge_model is None):
        raise typer.BadParameter("a judge is an endpoint and a model: give --judge-base-url and --judge-model")
    judge = None
    if judge_base_url is not None and judge_model is not None:
        judge = JudgeSetup(judge_base_url, judge_model, os.environ.get(judge_api_key_env, "none"))
    try:
        source = Source(world, videos, seed, phrasing, manifest, split)
        setup = Setup(
            model=model,
            hypernetwork=hypernetwork,
            arms=tuple(arm.strip() for arm in arms.split(",")),
            composition=composition,
            through=through,
            base_url=base_url,
            api_key=api_key,
            serve_flags=serve_flags,
            max_frames=max_frames,
            merge_rate=merge_rate,
            max_tokens=max_tokens or (64 if manifest is None else 256),
            concurrency=concurrency,
            judge=judge,
            metric=metric,
            margin=margin,
            equivalence_margin=equivalence_margin,
        )
        extras = Extras.of(sweep, sweep_frames, sweep_resolutions, diagnostics, plots, browse, setup)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    run(source, setup, extras, work, json_to, markdown_to)


@app.command()
def demo(
    video: Annotated[Path | None, typer.Argument(help="Your own mp4; default: one is made.")] = None,
    model: Model = DEFAULT_MODEL,
    hypernetwork: Hypernetwork = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on; default: a free one.")] = None,
) -> None:
    """The whole way: make a video, serve, upload it with the openai client, ask, compare with frames in context."""
    from f2l_vllm.commands.demo import demo as run

    run(video, model, hypernetwork, port)


@app.command()
def doctor(model: Model = DEFAULT_MODEL, hypernetwork: Hypernetwork = None) -> None:
    """Say what is installed, which device there is, and what `serve` would use."""
    from f2l_vllm.commands.doctor import doctor as run

    run(model, hypernetwork)


app.command()(measuring.bench)
app.command()(measuring.plan)
app.command()(training.train)
app.command("make-model")(training.make_model)


@app.command()
def targets(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Questions about videos, as JSONL.")],
    output: Annotated[Path, typer.Option("-o", "--output", dir_okay=False, help="The manifest with answers to write.")],
    model: Annotated[
        str | None, typer.Option(help="Who answers: as for serve, or a name on the server; default: its first model.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Let a running server answer, e.g. http://127.0.0.1:8000/v1.")
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its API key.")] = "none",
    shard: Annotated[str, typer.Option(help="i/n: only every n-th video, from the i-th on.")] = "0/1",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    concurrency: Annotated[int, typer.Option(min=1, help="Clips a server is asked about at a time.")] = 8,
    max_frames: MaxFrames = None,
    fps: Fps = None,
    report: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write what is left out, and why, to this JSONL file.")
    ] = None,
) -> None:
    """Let the base model, with the frames in context, write the answers to learn. Goes on where it was stopped."""
    from f2l_vllm.commands.targets import write_locally, write_through_server

    if base_url is None:
        write_locally(manifest, output, model or DEFAULT_MODEL, shard, max_tokens, max_frames, fps, report)
        return
    if max_frames is not None or fps is not None:
        raise typer.BadParameter("a server reads frames as it was started to: give it --media-io-kwargs instead")
    write_through_server(manifest, output, base_url, api_key, model, shard, max_tokens, concurrency, report)


app.add_typer(manifest_app, name="manifest")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
