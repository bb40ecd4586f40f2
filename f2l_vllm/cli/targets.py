"""`f2l-vllm targets`: let the base model, with the frames in context, answer every example of a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from f2l_vllm import models, torch_shims
from f2l_vllm.cli.manifest import as_usage_errors, console, counting, tell_rejections
from f2l_vllm.cli.progress import status

if TYPE_CHECKING:
    from f2l_vllm.train.data.teacher import Teacher


def write_locally(
    manifest: Path,
    output: Path,
    model: str,
    shard: str,
    max_tokens: int,
    max_frames: int | None,
    fps: float | None,
    report: Path | None,
) -> None:
    """Answer with transformers, in this process."""
    torch_shims.install()
    from f2l_vllm.train.data.teacher import LocalTeacher
    from f2l_vllm.video.sample import Sampling

    with as_usage_errors(), status(console, "loading the teacher"):
        sampling = Sampling(max_frames, fps)
        teacher = LocalTeacher.load(models.resolve(model), model, max_tokens=max_tokens, sampling=sampling)
    _write(manifest, output, teacher, shard, report)


def write_through_server(
    manifest: Path,
    output: Path,
    base_url: str,
    api_key: str,
    model: str | None,
    shard: str,
    max_tokens: int,
    concurrency: int,
    report: Path | None,
) -> None:
    """Let a running server answer."""
    torch_shims.install()
    from f2l_vllm.train.data.teacher import ServerTeacher

    with as_usage_errors():
        teacher = ServerTeacher(base_url, api_key, model, max_tokens=max_tokens, concurrency=concurrency)
    _write(manifest, output, teacher, shard, report)


def _write(manifest: Path, output: Path, teacher: Teacher, shard: str, report: Path | None) -> None:
    from f2l_vllm.train.data.targets import Shard, partial_path, write_targets
    from f2l_vllm.train.data.teacher import TeacherError

    try:
        with as_usage_errors(), counting("answering") as on_progress:
            examples, rejections = write_targets(manifest, output, teacher, Shard.parse(shard), on_progress)
    except TeacherError as error:
        console.print(f"[red]stopped[/]: {error}\n{partial_path(output)} is kept: run the same command to go on")
        raise typer.Exit(1) from error
    tell_rejections(rejections, report)
    console.print(f"{output}: {len(examples)} targets by {teacher.settings['model']}", soft_wrap=True)
    if rejections and not examples:
        raise typer.Exit(1)
