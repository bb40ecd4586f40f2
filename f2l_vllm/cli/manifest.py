"""`f2l-vllm manifest`: make manifests, and check which of their videos can be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from f2l_vllm import torch_shims
from f2l_vllm.cli.files import Overwrite, keep
from f2l_vllm.cli.progress import progress

if TYPE_CHECKING:
    from f2l_vllm.train.data.inspection import Rejection

console = Console()
app = typer.Typer(help="Make and check manifests: JSONL files of questions about videos.", no_args_is_help=True)

Seed = Annotated[int, typer.Option(help="The same seed gives the same manifest.")]
Report = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Write what is left out, and why, to this JSONL file.")
]


@app.command()
def world(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="Gets manifest.jsonl and videos/.")],
    videos: Annotated[int, typer.Option(min=1, help="How many.")],
    seed: Seed = 0,
    split: Annotated[str, typer.Option(help="Scenes for training (train), or never seen in it (held-out).")] = "train",
    questions_per_video: Annotated[
        int | None, typer.Option(min=1, help="So many types of question a video; default: one of each.")
    ] = None,
) -> None:
    """Film the synthetic world as mp4 files, with questions and true answers. Goes on where it was stopped."""
    torch_shims.install()
    from f2l_vllm.train.data.world_manifest import write_world
    from f2l_vllm.train.steps import one_thread

    with as_usage_errors(), counting("filming") as report, one_thread():
        path, filmed = write_world(
            folder,
            videos=videos,
            seed=seed,
            split=split,
            questions_per_video=questions_per_video,
            on_progress=report,
        )
    console.print(f"{path}: {videos} videos, {filmed} filmed now, {videos - filmed} were there", soft_wrap=True)


@app.command()
def finevideo(
    metadata_folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="FineVideo's JSON files, one a video.")
    ],
    video_folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Its mp4 files, of the same names.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", dir_okay=False, help="The manifest to write.")],
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many examples; default: all there are.")] = None,
    report: Report = None,
    overwrite: Overwrite = False,
) -> None:
    """Single scenes, adjacent scenes and whole videos of FineVideo, 60/30/10, with targets from its metadata."""
    keep(output, report, overwrite=overwrite)
    torch_shims.install()
    from f2l_vllm.train.data.finevideo import build_manifest
    from f2l_vllm.train.data.manifest import write_manifest

    with as_usage_errors(), counting("inspecting") as on_progress:
        examples, rejections = build_manifest(
            metadata_folder, video_folder, seed=seed, limit=limit, on_progress=on_progress
        )
    write_manifest(output, examples)
    kinds = Counter(example.metadata["span"] for example in examples)
    splits = Counter(example.split for example in examples)
    for name, count in (("spans", kinds), ("splits", splits)):
        console.print(f"{name}: " + ", ".join(f"{number} {kind}" for kind, number in count.most_common()))
    empty = sum(not example.target_text for example in examples)
    if empty:
        console.print(f"{empty} have no target: let `f2l-vllm targets` write them")
    tell_rejections(rejections, report)
    console.print(f"{output}: {len(examples)} examples", soft_wrap=True)


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A manifest.")],
    report: Report = None,
    clean: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the manifest without bad videos to this file.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Inspect every video of a manifest, and its spans. Without --clean, bad ones make the exit code 1."""
    keep(clean, report, overwrite=overwrite)
    torch_shims.install()
    from f2l_vllm.train.data.inspection import inspect_examples
    from f2l_vllm.train.data.manifest import read_manifest, write_manifest

    with as_usage_errors(), counting("inspecting") as on_progress:
        examples = read_manifest(manifest)
        good, rejections = inspect_examples(examples, on_progress=on_progress)
    tell_rejections(rejections, report)
    if clean is not None:
        write_manifest(clean, good)
    console.print(f"{len(good)} of {len(examples)} examples can be used")
    if rejections and clean is None:
        raise typer.Exit(1)


@contextmanager
def as_usage_errors() -> Iterator[None]:
    """Report a user's mistake in a sentence, not in a traceback."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of one stage; yields a function that takes how many are done and how many there are."""
    with progress(console) as tell:
        yield lambda done, total: tell(what, done, total)


def tell_rejections(rejections: Sequence[Rejection], report: Path | None) -> None:
    """Print how many examples were left out for which reasons, and write all of them to the report."""
    from f2l_vllm.train.data.manifest import write_jsonl

    reasons: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        reasons.setdefault(rejection.reason.split(":")[0], []).append(rejection)
    for code, some in sorted(reasons.items(), key=lambda item: -len(item[1])):
        first = escape(f"{some[0].video}: {some[0].reason}")
        console.print(f"left out: {len(some)} x [red]{code}[/], e.g. {first}", soft_wrap=True)
    if report is not None:
        write_jsonl(report, (rejection.to_row() for rejection in rejections))
