"""The same questions about the same videos at several resolutions: scenes filmed anew, or files scaled down."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av

from f2l_vllm import torch_shims
from f2l_vllm.evaluation.questions import Clip, QuestionSet
from f2l_vllm.files import atomic_path

torch_shims.install()

from f2l_vllm.synthetic.render import FRAME_SIZES, fit, write_mp4  # noqa: E402
from f2l_vllm.synthetic.world import Scene  # noqa: E402

Film = Callable[[int, int, Path], None]  # which clip, longest edge in pixels, the file to write

_FPS = 10


def of_scenes(scenes: list[Scene], seconds: float) -> Film:
    """Draw the world's scenes anew, each `seconds` long, in the frame shapes that the evaluation uses."""

    def film(index: int, edge: int, path: Path) -> None:
        size = fit(FRAME_SIZES[index % len(FRAME_SIZES)], edge)
        write_mp4(scenes[index], path, size=size, fps=_FPS, seconds=seconds)

    return film


def of_files(clips: tuple[Clip, ...]) -> Film:
    """Scale the clips' files down; those with a smaller longest edge keep their size."""

    def film(index: int, edge: int, path: Path) -> None:
        with av.open(str(clips[index].path)) as source, av.open(str(path), "w") as target:
            read = source.streams.video[0]
            width, height = fit((read.width, read.height), min(edge, max(read.width, read.height)))
            rate = Fraction(read.average_rate or 25).limit_denominator(2**16)
            written = target.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "veryfast"})
            written.width, written.height, written.pix_fmt = width, height, "yuv420p"
            written.time_base = read.time_base or 1 / rate
            for frame in source.decode(read):
                scaled = frame.reformat(width, height, format="yuv420p")
                target.mux(written.encode(scaled))
            target.mux(written.encode())

    return film


def at_resolutions(
    questions: QuestionSet, film: Film, edges: tuple[int, ...], folder: Path, identity: dict[str, object]
) -> tuple[QuestionSet, dict[str, int]]:
    """One set that asks every question at every resolution.

    Args:
        film: makes the files; each is made once and kept in `folder`.
        identity: what the files depend on besides the questions.

    Returns:
        The set, and the resolution that each question's id belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clips: list[Clip] = []
    edge_of: dict[str, int] = {}
    for edge in edges:
        for index, clip in enumerate(questions.clips):
            path = folder / f"{edge}px-{index:04d}.mp4"
            if not path.exists():
                with atomic_path(path) as staging:
                    film(index, edge, staging)
            asked = tuple(replace(question, id=f"{edge}px/{question.id}") for question in clip.questions)
            edge_of |= {question.id: edge for question in asked}
            clips.append(Clip(os.path.join("..", folder.name, path.name), path, clip.source, asked))
    return replace(questions, identity=questions.identity | identity, clips=tuple(clips)), edge_of
