"""Where questions come from: fresh videos of the synthetic world, or a JSONL manifest."""

from __future__ import annotations

import hashlib
import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path

from f2l_vllm.evaluation.questions import Clip, Question, QuestionSet, Skipped
from f2l_vllm.training import phrases
from f2l_vllm.training.clips import UnusableVideoError, clip_file
from f2l_vllm.training.manifest import Example, read_manifest
from f2l_vllm.training.render import write_mp4
from f2l_vllm.training.stages import FRAME_SIZES
from f2l_vllm.training.world import Scene, sample_scenes

Progress = Callable[[int, int], None]  # done, of how many

VIDEOS_FOLDER = "videos"
PHRASINGS = ("seen", "unseen")
_SECONDS = (2.5, 4.0, 6.0, 8.0, 10.0)
_FPS = (10, 24, 30)


def world_questions(
    split: str,
    videos: int,
    seed: int,
    work: Path,
    *,
    phrasing: str = "seen",
    on_progress: Progress | None = None,
) -> QuestionSet:
    """One question of each type, and a request for a caption, about each of `videos` fresh scenes of a split.

    Files of several sizes, frame rates and lengths are written to `work/videos`, those of an earlier call kept.
    Captions are scored apart.

    Raises:
        ValueError: no such split or phrasing, or no video.
    """
    if videos < 1:
        raise ValueError(f"there is nothing to ask about {videos} videos: give at least 1")
    if phrasing not in PHRASINGS:
        raise ValueError(f"unknown phrasing {phrasing!r}: choose one of {', '.join(PHRASINGS)}")
    scenes = sample_scenes(videos, seed, split)
    rng = random.Random(f"questions:{seed}")
    clips = []
    for index, scene in enumerate(scenes):
        name = f"{split}-{seed}-{index:04d}"
        path = _video(scene, index, work / VIDEOS_FOLDER / f"{name}.mp4")
        asked = [
            phrases.ask(scene, kind, rng, unseen=phrasing == "unseen")
            for kind in (*phrases.QUESTION_TYPES, phrases.CAPTION)
        ]
        questions = tuple(
            Question(f"{name}/{kind}", text, truth, kind, f"world, {split}") for text, truth, kind in asked
        )
        clips.append(Clip(_name(path, work), path, path, questions))
        if on_progress:
            on_progress(index + 1, videos)
    identity = {"world": split, "videos": videos, "seed": seed, "phrasing": phrasing}
    return QuestionSet(identity, tuple(clips), "exact_match", apart=frozenset({phrases.CAPTION}))


def manifest_questions(
    manifest: Path, work: Path, *, split: str | None = None, on_progress: Progress | None = None
) -> QuestionSet:
    """The examples of a manifest. A span of a video becomes a file of its own in `work/videos`.

    Examples without a true answer, and those whose video cannot be used, are skipped with a reason.

    Raises:
        ValueError: the manifest cannot be read, or no example can be used.
    """
    examples = read_manifest(manifest, split)
    groups: dict[tuple[Path, tuple[float, float] | None], list[Example]] = {}
    skipped = []
    for example in examples:
        if example.target_text.strip():
            groups.setdefault((example.video_path, example.span), []).append(example)
        else:
            skipped.append(Skipped(str(example.video_path), f"{example.id}: no target_text to compare answers with"))
    clips = []
    for number, ((source, _), asked) in enumerate(groups.items()):
        try:
            path = clip_file(asked[0], work / VIDEOS_FOLDER)
        except UnusableVideoError as error:
            skipped.append(Skipped(str(source), str(error)))
            continue
        finally:
            if on_progress:
                on_progress(number + 1, len(groups))
        questions = tuple(Question(e.id, e.prompt, e.target_text, e.task_type, e.dataset) for e in asked)
        clips.append(Clip(_name(path, work), path, source, questions))
    if not clips:
        raise ValueError(f"{manifest} has no example to ask about; the first reason: {skipped[0].reason}")
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    identity = {"manifest": manifest.name, "sha256": digest, "split": split}
    return QuestionSet(identity, tuple(clips), "f1", skipped=tuple(skipped))


def _video(scene: Scene, index: int, path: Path) -> Path:
    """Write a scene's file unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.mp4")
        try:
            write_mp4(
                scene,
                staging,
                size=FRAME_SIZES[index % len(FRAME_SIZES)],
                fps=_FPS[index % len(_FPS)],
                seconds=_SECONDS[index % len(_SECONDS)],
            )
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)
    return path


def _name(path: Path, work: Path) -> str:
    """How answers name a video: relative to the working folder where it lies inside."""
    path, work = Path(os.path.abspath(path)), Path(os.path.abspath(work))
    return str(path.relative_to(work) if path.is_relative_to(work) else path)
