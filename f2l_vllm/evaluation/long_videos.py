"""Films that grow, and questions about their moments: what was there at minute m, and what came first.

A film is a row of scenes of the synthetic world, one frame a second. A question is about one of its scenes, named by
its time, or about the order of two. Few of a long film's frames show the answer, wherever in the film that is.

Each film is asked in four ways, in this process: from an adapter made in one pass over all frames, from one composed of
chunks, from all frames in context, and alone. What does not fit into the model's context is left out, with the reason.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from f2l_vllm import torch_shims
from f2l_vllm.evaluation.answers import AnswerLog, AnswerRecord
from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import ADAPTER, FRAMES, NONE, Ask, Clip, Question, QuestionSet, Reply, Skipped
from f2l_vllm.evaluation.questions import chunk_arm as _in_chunks
from f2l_vllm.evaluation.run import Progress, identity_of
from f2l_vllm.evaluation.scores import Scores
from f2l_vllm.evaluation.setup import TRANSFORMERS, Setup
from f2l_vllm.files import atomic_path
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.world import Scene, draw_scene

torch_shims.install()

from f2l_vllm.synthetic.render import write_film  # noqa: E402

CHUNKED = "chunks"
ARMS = (ADAPTER, CHUNKED, FRAMES, NONE)
SCENE_SECONDS = 4  # the shortest film has three scenes
ABOUT_A_MOMENT = ("background", "count", "has object")
ORDER = "first"
_SIZE = (128, 96)


def film(seconds: int, seed: int) -> list[Scene]:
    """The scenes of a film; no scene has the background of the one before.

    Raises:
        ValueError: it is too short for two scenes.
    """
    if seconds < 2 * SCENE_SECONDS:
        raise ValueError(f"a film has at least {2 * SCENE_SECONDS} frames, for two scenes; got {seconds}")
    rng = random.Random(f"film:{seed}")
    scenes = [draw_scene(rng, "held-out")]
    while len(scenes) < seconds // SCENE_SECONDS:
        scene = draw_scene(rng, "held-out")
        if scene.background != scenes[-1].background:
            scenes.append(scene)
    return scenes


def moments(scenes: Sequence[Scene], name: str, count: int, seed: int) -> tuple[Question, ...]:
    """`count` questions of each type, about moments spread over the film.

    Of two backgrounds in a question about their order, each is asked about where it is seen for the first time.
    """
    rng = random.Random(f"moments:{name}:{seed}")
    asked: list[tuple[str, str, str]] = []
    for number in range(count):
        part = range(number * len(scenes) // count, max((number + 1) * len(scenes) // count, 1))
        place = rng.choice(part) if part else rng.randrange(len(scenes))
        second = place * SCENE_SECONDS + SCENE_SECONDS // 2
        for kind in ABOUT_A_MOMENT:
            text, truth, _ = phrases.ask(scenes[place], kind, rng)
            at = f"{second // 60:02d}:{second % 60:02d}"
            asked.append((f"At {at}, {text[0].lower()}{text[1:]}", truth, kind))
        seen = list(dict.fromkeys(scene.background for scene in scenes))
        one, other = rng.sample(seen, 2)
        first = min(one, other, key=seen.index)
        asked.append((f"Which background comes first, {one} or {other}?", f"{first.capitalize()}.", ORDER))
    return tuple(
        Question(f"{name}/{number}", text, truth, kind, "films") for number, (text, truth, kind) in enumerate(asked)
    )


def long_videos(
    frames: Sequence[int],
    films: int,
    setup: Setup,
    work: Path,
    *,
    questions: int = 4,
    seed: int = 0,
    max_chunks: int = 15,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask about films of every length.

    Args:
        frames: lengths, in frames and seconds.
        films: how many of each length.
        questions: of each type about each film.
        max_chunks: a film is cut into as many chunks as the hypernetwork's own number of frames needs, up to this many.
        work: folder for films and answers, to resume from.

    Returns:
        as JSON: `rows`, one per length and way: `frames, arm, chunks, score, ci95, n, videos, prompt_tokens, by_type`,
        and `skipped`: what did not fit, with `frames` and the reason.

    Raises:
        ValueError: a film that is too short, or `work` holds answers of another configuration.
    """
    report = on_progress or (lambda stage, done, total: None)
    rows, skipped = [], []
    setup = replace(setup, through=TRANSFORMERS, arms=(ADAPTER, FRAMES, NONE))
    clips = {length: _clips(length, films, questions, seed, work) for length in frames}
    answers = TransformersAnswers(setup.model, setup.hypernetwork, setup.reading, max_tokens=setup.max_tokens)
    own = answers.internalizer.sampling
    at_once = own.max_frames or answers.internalizer.processor.video_processor.num_frames
    for number, length in enumerate(frames):
        report("lengths", number, len(frames))
        identity = {"frames": length, "films": films, "questions": questions, "seed": seed, "max_chunks": max_chunks}
        asked = QuestionSet(identity, clips[length], "exact_match")
        chunks = min(max_chunks, math.ceil(length / at_once))
        with AnswerLog(work / f"{length}-frames", identity_of(asked, setup)) as log:
            for way in ARMS:
                answers.internalizer.sampling = own if way == CHUNKED else replace(own, max_frames=length)
                left = _skipped(answers, asked, way, _in_chunks(chunks) if way == CHUNKED else way, log)
                skipped += [{"frames": length, **asdict(one)} for one in left]
            scores = Scores(log.answers.values(), asked.metric)
            rows += [_row(scores, length, way, chunks if way == CHUNKED else None) for way in ARMS]
    report("lengths", len(frames), len(frames))
    return {"rows": rows, "skipped": skipped}


def _clips(length: int, films: int, questions: int, seed: int, work: Path) -> tuple[Clip, ...]:
    clips = []
    for number in range(films):
        name = f"film-{length}-{seed}-{number}"
        path, scenes = work / "films" / f"{name}.mp4", film(length, seed * films + number)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as staging:
                write_film(scenes, staging, _SIZE, 1, SCENE_SECONDS)
        clips.append(Clip(name, path, name, moments(scenes, name, questions, seed)))
    return tuple(clips)


def _skipped(answers: TransformersAnswers, asked: QuestionSet, way: str, arm: str, log: AnswerLog) -> list[Skipped]:
    """Ask what the log does not hold; returns what could not be asked."""
    skipped: list[Skipped] = []
    asks = [
        Ask(clip, question, arm, None if arm == NONE else clip)
        for clip in asked.clips
        for question in clip.questions
        if (way, question.id) not in log.answers
    ]

    def on_reply(ask: Ask, reply: Reply) -> None:
        log.append(AnswerRecord.of(replace(ask, arm=way), reply))

    answers.answer(asks, on_reply, lambda one: skipped.append(replace(one, arm=way)))
    return skipped


def _row(scores: Scores, length: int, way: str, chunks: int | None) -> dict[str, Any]:
    found = scores.arm(way)
    kept = {name: found[name] for name in ("score", "ci95", "n", "videos", "by_type")}
    return {"frames": length, "arm": way, "chunks": chunks, **kept, "prompt_tokens": found["cost"]["prompt_tokens"]}


def markdown(result: dict[str, Any]) -> str:
    """The scores over lengths, as a table; a dash where a film did not fit."""
    lengths = list(dict.fromkeys(row["frames"] for row in result["rows"]))
    cell = {(row["frames"], row["arm"]): row for row in result["rows"]}
    lines = [f"| frames | {' | '.join(ARMS)} |", "|---" * (len(ARMS) + 1) + "|"]
    for length in lengths:
        rows = [cell[length, way] for way in ARMS]
        found = ["–" if row["score"] is None else f"{row['score']:.3f}" for row in rows]
        lines.append(f"| {length:,} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"
