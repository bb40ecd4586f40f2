"""The command line, `f2l-vllm`. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from f2l_vllm import __version__
from f2l_vllm.cli import hub, measuring, serving, training
from f2l_vllm.cli.cluster import app as cluster_app
from f2l_vllm.cli.files import Overwrite, keep
from f2l_vllm.cli.keys import app as keys_app
from f2l_vllm.cli.manifest import app as manifest_app
from f2l_vllm.cli.options import (
    DEFAULT_MODEL,
    ChunkFrames,
    ChunkSeconds,
    Fps,
    Hypernetwork,
    MaxChunks,
    MaxFrames,
    MergeRate,
    Model,
    Video,
    video_file,
)
from f2l_vllm.cli.paper import app as paper_app
from f2l_vllm.cli.plain import PlainGroup
from f2l_vllm.video.reading import ReadingOptions

app = typer.Typer(
    name="f2l-vllm",
    cls=PlainGroup,
    help="Ask questions about a video at the cost of text: a hypernetwork writes a LoRA adapter that vLLM serves.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


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


@app.command()
def internalize(
    video: Video,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the PEFT adapter; must not exist.")],
    model: Model = DEFAULT_MODEL,
    hypernetwork: Hypernetwork = None,
    max_frames: MaxFrames = None,
    fps: Fps = None,
    chunk_seconds: ChunkSeconds = None,
    chunk_frames: ChunkFrames = None,
    max_chunks: MaxChunks = 15,
    merge_rate: MergeRate = 0.0,
) -> None:
    """Read a video once and write its LoRA adapter, without a server."""
    from f2l_vllm.cli.local import internalize as run

    try:
        reading = ReadingOptions(max_frames, fps, chunk_seconds, chunk_frames, max_chunks, merge_rate)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    run(video, output, model, hypernetwork, reading)


@app.command()
def ask(
    video: Video,
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
    from f2l_vllm.cli import local

    if url is not None:
        local.ask_server(video, question, url, api_key, max_tokens)
    else:
        local.ask(video, question, model, hypernetwork, max_tokens)


@app.command()
def upload(
    sources: Annotated[list[str], typer.Argument(help="Videos, folders with videos, or patterns in quotes.")],
    url: Annotated[str, typer.Option(help="The server, e.g. http://127.0.0.1:8000/v1.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", dir_okay=False, help="The manifest; default: standard output.")
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its API key.")] = "none",
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Videos sent at a time.")] = 8,
    wait: Annotated[bool, typer.Option("--wait", help="Until every video is processed.")] = False,
    expires_after: Annotated[
        int | None, typer.Option(min=3600, max=2592000, help="Seconds after which the files go; default: never.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Send many videos to a running server, each once; a line of JSON for each says its file id. Goes on where it was
    stopped."""
    from f2l_vllm.cli.upload import upload as run

    keep(output, overwrite=overwrite)
    run(sources, url, api_key, output, parallel, wait, expires_after)


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
    from f2l_vllm.cli.local import convert as run

    run(checkpoint, output, base_model, dtype)


@app.command()
def adopt(
    revision: Annotated[str | None, typer.Argument(help="Of waiting servers, as their log says it.")] = None,
    database_url: Annotated[str | None, typer.Option(help="The servers' catalog (F2L_DATABASE_URL).")] = None,
    home: Annotated[Path | None, typer.Option(help="The servers' data folder (F2L_HOME), without a database.")] = None,
) -> None:
    """Change the models that files are answered with to those of servers that wait beside the others."""
    from f2l_vllm.cli.adopt import adopt as run
    from f2l_vllm.store.errors import Unavailable

    try:
        run(revision, database_url, home)
    except (ValueError, Unavailable) as error:
        raise typer.BadParameter(str(error)) from error


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
    composition: Annotated[bool, typer.Option("--composition", help="Also the video in several chunks.")] = False,
    chunks: Annotated[str, typer.Option(help="In how many, by comma; the first is 1.")] = "1,2,4",
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
    keep_rate: Annotated[
        float, typer.Option(help="Part of the visual tokens that the arms frames-evs and frames-v2drop keep.")
    ] = 0.5,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; default: 64, manifests 256.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions in work at a time.")] = 8,
    metric: Annotated[
        str | None, typer.Option(help="exact_match, f1 or judge; default: exact_match, manifests judge or f1.")
    ] = None,
    margin: Annotated[float | None, typer.Option(help="Of non-inferiority; default: 0.05, judge 0.75.")] = None,
    equivalence_margin: Annotated[float | None, typer.Option(help="Of equivalence; default: the same.")] = None,
    judge_base_url: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint that judges answers.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model.")] = None,
    judge_api_key_env: Annotated[str, typer.Option(help="Variable that holds its API key.")] = "OPENAI_API_KEY",
    judge_rubric: Annotated[
        str, typer.Option(help="What it is told: answer, paper-caption or paper-question.")
    ] = "answer",
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for videos and answers, to resume in; default: temporary.", file_okay=False),
    ] = None,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    markdown_to: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also over frames and resolution.")] = False,
    sweep_frames: Annotated[str, typer.Option(help="Numbers of frames, by comma.")] = "4,8,16,32,64",
    sweep_resolutions: Annotated[str, typer.Option(help="Longest edges of the file, by comma.")] = "160,320,640",
    efficiency: Annotated[
        bool, typer.Option("--efficiency", help="Also accuracy over cost, of every way to read fewer tokens.")
    ] = False,
    diagnostics: Annotated[bool, typer.Option("--diagnostics", help="Also where in an adapter answers are.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots of all that was measured.")] = None,
    browse: Annotated[Path | None, typer.Option(help="Folder for a page of videos and answers; must be new.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say how good answers are: from adapters, from frames in context, from neither, under another video's adapter."""
    import os

    from f2l_vllm.cli.evaluate import QuestionSource, run
    from f2l_vllm.cli.evaluation_extras import Extras, numbers
    from f2l_vllm.evaluation.setup import JudgeSetup, Setup

    if (judge_base_url is None) != (judge_model is None):
        raise typer.BadParameter("a judge is an endpoint and a model: give --judge-base-url and --judge-model")
    judge = None
    try:
        if judge_base_url is not None and judge_model is not None:
            key = os.environ.get(judge_api_key_env, "none")
            judge = JudgeSetup(judge_base_url, judge_model, key, judge_rubric)
        source = QuestionSource(world, videos, seed, phrasing, manifest, split)
        setup = Setup(
            model=model,
            hypernetwork=hypernetwork,
            arms=tuple(arm.strip() for arm in arms.split(",")),
            composition=numbers("--chunks", chunks) if composition else (),
            through=through,
            base_url=base_url,
            api_key=api_key,
            serve_flags=serve_flags,
            max_frames=max_frames,
            merge_rate=merge_rate,
            keep_rate=keep_rate,
            max_tokens=max_tokens or (64 if manifest is None else 256),
            concurrency=concurrency,
            judge=judge,
            metric=metric,
            margin=margin,
            equivalence_margin=equivalence_margin,
        )
        extras = Extras.of(sweep, sweep_frames, sweep_resolutions, diagnostics, efficiency, plots, browse, setup)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    keep(json_to, markdown_to, plots, overwrite=overwrite)
    run(source, setup, extras, work, json_to, markdown_to)


@app.command()
def demo(
    video: Annotated[
        Path | None, typer.Argument(parser=video_file, metavar="VIDEO", help="As for ask; default: one is made.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    hypernetwork: Hypernetwork = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on; default: a free one.")] = None,
) -> None:
    """The whole way: make a video, serve, upload it with the openai client, ask, compare with frames in context."""
    from f2l_vllm import models
    from f2l_vllm.cli.checks import DEFAULT_HOST, check_listening

    try:
        models.resolve_hypernetwork(model, hypernetwork)
        if port is not None:
            check_listening(DEFAULT_HOST, port)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    from f2l_vllm.cli.demo import demo as run

    run(video, model, hypernetwork, port)


serving.add_to(app)
app.command()(measuring.bench)
app.command()(measuring.plan)
app.command()(training.train)
app.command("make-model")(training.make_model)
app.command()(hub.push)
app.command()(hub.pull)


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
    from f2l_vllm.cli.targets import write_locally, write_through_server

    if base_url is None:
        write_locally(manifest, output, model or DEFAULT_MODEL, shard, max_tokens, max_frames, fps, report)
        return
    if max_frames is not None or fps is not None:
        raise typer.BadParameter("a server reads frames as it was started to: give it --media-io-kwargs instead")
    write_through_server(manifest, output, base_url, api_key, model, shard, max_tokens, concurrency, report)


app.add_typer(manifest_app, name="manifest")
app.add_typer(paper_app, name="paper")
app.add_typer(keys_app, name="keys")
app.add_typer(cluster_app, name="cluster")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
