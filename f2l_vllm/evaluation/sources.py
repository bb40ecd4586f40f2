"""Where questions come from: fresh videos of the synthetic world, or a JSONL manifest."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

from f2l_vllm.evaluation.questions import Clip, Question, QuestionSet, Skipped
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.train.data.clips import UnusableVideoError, clip_file
from f2l_vllm.train.data.manifest import Example, read_manifest
from f2l_vllm.train.data.world_manifest import Film

Progress = Callable[[int, int], None]  # done, of how many

VIDEOS_FOLDER = "videos"
PHRASINGS = ("seen", "unseen")


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

    Files of several sizes, frame rates and lengths are written to `work/videos`; files of an earlier call are kept.
    Captions are scored apart.

    Raises:
        ValueError: no such split or phrasing, or no video.
    """
    if videos < 1:
        raise ValueError(f"there is nothing to ask about {videos} videos: give at least 1")
    if phrasing not in PHRASINGS:
        raise ValueError(f"unknown phrasing {phrasing!r}: choose one of {', '.join(PHRASINGS)}")
    scenes = sample_scenes(videos, seed, split)
    (work / VIDEOS_FOLDER).mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"questions:{seed}")
    clips = []
    for index, scene in enumerate(scenes):
        name = f"{split}-{seed}-{index:04d}"
        path = work / VIDEOS_FOLDER / f"{name}.mp4"
        if not path.exists():
            Film.draw(random.Random(name)).shoot(scene, path)
        asked = [
            phrases.ask(scene, kind, rng, unseen=phrasing == "unseen")
            for kind in (*phrases.QUESTION_TYPES, phrases.CAPTION)
        ]
        questions = tuple(
            Question(f"{name}/{kind}", text, truth, kind, f"world, {split}") for text, truth, kind in asked
        )
        known_as = _name(path, work)
        clips.append(Clip(known_as, path, known_as, questions))
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
        clips.append(Clip(_name(path, work), path, _name(source, work), questions))
    if not clips:
        raise ValueError(f"{manifest} has no example to ask about; the first reason: {skipped[0].reason}")
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    identity = {"manifest": manifest.name, "sha256": digest, "split": split}
    return QuestionSet(identity, tuple(clips), "f1", skipped=tuple(skipped))


def _name(path: Path, work: Path) -> str:
    """How answers name a file: relative to the working folder if it lies inside."""
    path, work = Path(os.path.abspath(path)), Path(os.path.abspath(work))
    return str(path.relative_to(work) if path.is_relative_to(work) else path)
