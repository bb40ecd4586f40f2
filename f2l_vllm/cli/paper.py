"""`f2l-vllm paper`: the paper's data sets asked here, our tables beside its own, and its figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from f2l_vllm.cli.files import Overwrite, keep
from f2l_vllm.cli.options import DEFAULT_MODEL, Hypernetwork, Model

app = typer.Typer(no_args_is_help=True, help="The tables and figures of the Frames2LoRA paper.")
_Set = Annotated[str, typer.Argument(metavar="SET", help="A set, as 'f2l-vllm paper list' names it.")]
_Folders = Annotated[list[Path], typer.Argument(exists=True, file_okay=False, help="Folders that 'prepare' made.")]


@app.command("list")
def list_sets() -> None:
    """The paper's data sets: where they come from, their licences, and the layout that is read."""
    from f2l_vllm.evaluation.paper.sets import SETS

    for one in SETS.values():
        number = f"{one.sample} videos" if one.by_video else f"{one.sample} examples"
        each = f" of each of {len(one.prompts)} types" if len(one.prompts) > 1 else ""
        typer.echo(f"{one.name}: {one.title}, {number}{each}")
        typer.echo(f"  from {one.source} (licence: {one.licence})")
        typer.echo(f"  annotations: {one.layout}")


@app.command()
def prepare(
    name: _Set,
    annotations: Annotated[Path, typer.Option(help="The set's annotations, a file or a folder.")],
    videos: Annotated[Path, typer.Option(help="The folder with its videos.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write to.")],
    sample: Annotated[int | None, typer.Option(min=1, help="Examples of each type; default: the paper's.")] = None,
    seed: Annotated[int, typer.Option(help="Which examples; the paper's are not known.")] = 0,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Go on without videos that lack.")] = False,
) -> None:
    """Draw a set's sample and find its videos; says which are missing."""
    from f2l_vllm.evaluation.paper.preparing import prepare as make
    from f2l_vllm.evaluation.paper.sets import find

    try:
        made = make(find(name), annotations, videos, out, sample=sample, seed=seed, allow_missing=allow_missing)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(
        f"{made.manifest}: {made.examples} examples"
        + (f", {len(made.missing)} videos are missing" * bool(made.missing))
    )


@app.command()
def run(
    folders: _Folders,
    model: Model = DEFAULT_MODEL,
    hypernetwork: Hypernetwork = None,
    base_url: Annotated[str | None, typer.Option(help="A running server; else one is started, with 12 frames.")] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its API key.")] = "none",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer; the paper does not state its own.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions in work at a time.")] = 8,
    judge_base_url: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint that judges answers.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model; default: the paper's.")] = None,
    judge_api_key_env: Annotated[str, typer.Option(help="Variable that holds its API key.")] = "OPENAI_API_KEY",
) -> None:
    """Ask every prepared set from adapters and from frames, and score by token F1 and, with a judge, by its scores.
    Answers are kept in the folders: repeat the command to go on."""
    from f2l_vllm.cli.evaluate import QuestionSource
    from f2l_vllm.cli.evaluate import run as evaluate
    from f2l_vllm.cli.evaluation_extras import Extras
    from f2l_vllm.evaluation.paper.preparing import MANIFEST, prepared_set
    from f2l_vllm.evaluation.paper.published import F1, JUDGE
    from f2l_vllm.evaluation.paper.sets import FRAMES
    from f2l_vllm.evaluation.paper.sets import JUDGE as PAPERS_JUDGE
    from f2l_vllm.evaluation.paper.tables import result_file
    from f2l_vllm.evaluation.setup import JudgeSetup, Setup

    if judge_base_url is None and judge_model is not None:
        raise typer.BadParameter("a judge is an endpoint and a model: give --judge-base-url")
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            raise typer.BadParameter(f"{folder} has no {MANIFEST}: prepare the set first")
    for folder in folders:
        judge = None
        if judge_base_url is not None:
            key = os.environ.get(judge_api_key_env, "none")
            judge = JudgeSetup(judge_base_url, judge_model or PAPERS_JUDGE, key, prepared_set(folder).rubric)
        for metric in (F1, JUDGE) if judge is not None else (F1,):
            setup = Setup(
                model=model,
                hypernetwork=hypernetwork,
                arms=("adapter", "frames"),
                base_url=base_url,
                api_key=api_key,
                max_frames=FRAMES if base_url is None else None,
                max_tokens=max_tokens,
                concurrency=concurrency,
                judge=judge if metric == JUDGE else None,
                metric=metric,
            )
            source = QuestionSource(manifest=folder / MANIFEST)
            evaluate(source, setup, Extras(), folder / "work", folder / result_file(metric), None)


@app.command()
def report(
    folders: _Folders,
    size: Annotated[str, typer.Option(help="Whose figures of the paper: 500m or 2.2b.")] = "500m",
    markdown_to: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
    latex_to: Annotated[Path | None, typer.Option("--latex", help="Write them as LaTeX here.")] = None,
    page_to: Annotated[Path | None, typer.Option("--page", help="Write them as an HTML page here.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Our tables, the paper's beside them, and the difference; by every metric that was run."""
    from f2l_vllm.evaluation.paper import tables
    from f2l_vllm.evaluation.paper.published import METRICS, SIZES
    from f2l_vllm.files import write_whole

    keep(markdown_to, latex_to, page_to, overwrite=overwrite)
    if size not in SIZES:
        raise typer.BadParameter(f"the paper has figures for {' and '.join(SIZES)}, not for {size!r}")
    try:
        found = []
        for metric in METRICS:
            done = [folder for folder in folders if (folder / tables.result_file(metric)).is_file()]
            if done:
                found.append(tables.read(done, metric, size))
        if not found:
            raise ValueError(f"nothing was run: f2l-vllm paper run {' '.join(map(str, folders))}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    shown = "\n".join(tables.markdown(one) for one in found)
    typer.echo(shown)
    for path, text in (
        (markdown_to, shown),
        (latex_to, "\n".join(tables.latex(one) for one in found)),
        (page_to, tables.page(found)),
    ):
        if path is not None:
            write_whole(path, text)


@app.command()
def figures(context: typer.Context) -> None:
    """The paper's figures: what each measures, by which command and options, and what the paper found."""
    from f2l_vllm.cli.paper_figures import tell

    tell(context.find_root())


@app.command()
def figure(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A figure, as 'f2l-vllm paper figures' names it.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Shipped model, directory, or hub id.")] = DEFAULT_MODEL,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for results, plots and work; default: NAME.", file_okay=False),
    ] = None,
    hypernetwork: Hypernetwork = None,
    small: Annotated[bool, typer.Option("--small", help="A small variant: f2l-tiny takes under a minute.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any option of the figure's command: key=value, the value as YAML."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure a figure with the paper's settings. Repeat the command to go on where it was stopped (a benchmark: with
    --set resume=true)."""
    from f2l_vllm.cli.paper_figures import run as measure

    try:
        measure(context.find_root(), name, model, hypernetwork, small, set_ or [], output or Path(name), overwrite)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
