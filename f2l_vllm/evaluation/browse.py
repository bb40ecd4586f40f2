"""A static page with videos, questions and answers side by side; it opens in any browser, without a server."""

from __future__ import annotations

import re
import shutil
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from f2l_vllm.evaluation.answers import ANSWERS_FILE, AnswerRecord
from f2l_vllm.evaluation.questions import (
    ADAPTER,
    ARMS,
    DROPPING_ARMS,
    EVS,
    FRAMES,
    NONE,
    V2DROP,
    WRONG_VIDEO,
    chunks_of,
)
from f2l_vllm.files import atomic_directory
from f2l_vllm.train.data.manifest import write_jsonl

PAGE_FILE = "index.html"
VIDEO_FOLDER = "videos"
RIGHT_F1 = 0.5

_TEMPLATES = Path(__file__).parent / "templates"
_RIGHT_MEANS = {
    "exact_match": "it equals the truth to the letter",
    "f1": f"its token F1 with the truth is {RIGHT_F1} or more",
}
_ARM_MEANS = {
    ADAPTER: "the question alone, under the video's adapter",
    FRAMES: "the frames in the prompt",
    NONE: "the question alone",
    EVS: "the frames in the prompt, without the tokens that resemble the frame before",
    V2DROP: "the frames in the prompt; between layers, the tokens that change least are dropped",
    WRONG_VIDEO: "the question alone, under another video's adapter",
}


@dataclass
class _Arm:
    name: str
    meaning: str
    right: int = 0
    answered: int = 0


@dataclass
class _Question:
    text: str
    type: str
    truth: str
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Video:
    name: str
    source: str
    questions: dict[str, _Question] = field(default_factory=dict)


def write_page(answers: Sequence[AnswerRecord], videos: Path, output: Path, *, metric: str, title: str) -> Path:
    """Write the page, the videos it plays and the answers it shows into a folder, whole or not at all.

    Args:
        answers: of any arms; one row per question, one column per arm.
        videos: the folder that relative video paths start from.
        output: a folder that does not exist, or is empty.
        metric: what makes an answer right: `exact_match`, or `f1` of at least `RIGHT_F1`.

    Returns:
        The page's path.

    Raises:
        ValueError: there are no answers, or a video is not where the answers say.
        FileExistsError: the output folder is not empty.
    """
    if not answers:
        raise ValueError("there are no answers to show: run the evaluation first")
    answers = sorted(answers, key=lambda one: (one.video, one.type, one.id, one.arm))  # they arrive in any order
    files = {answer.video: videos / answer.video for answer in answers}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(files)} videos are not there, e.g. {missing[0]}: restore them first")
    sources = {video: f"{VIDEO_FOLDER}/{_file_name(index, path)}" for index, (video, path) in enumerate(files.items())}
    # Files that spans were cut from are not in the folder; a number tells them apart without showing their paths.
    others = sorted({answer.source for answer in answers} - sources.keys())
    cut_from = sources | {source: f"source-{index:04d}" for index, source in enumerate(others)}
    with atomic_directory(output) as staging:
        (staging / VIDEO_FOLDER).mkdir()
        for video, path in files.items():
            shutil.copyfile(path, staging / sources[video])
        write_jsonl(
            staging / ANSWERS_FILE,
            (asdict(one) | {"video": sources[one.video], "source": cut_from[one.source]} for one in answers),
        )
        (staging / PAGE_FILE).write_text(_render(answers, sources, metric, title), encoding="utf-8")
    return output / PAGE_FILE


def _render(answers: Sequence[AnswerRecord], sources: dict[str, str], metric: str, title: str) -> str:
    arms = {name: _Arm(name, _meaning(name)) for name in _in_order({answer.arm for answer in answers})}
    videos = {video: _Video(Path(video).name, source) for video, source in sources.items()}
    for answer in answers:
        right = answer.exact_match if metric == "exact_match" else answer.f1 >= RIGHT_F1
        arms[answer.arm].right += right
        arms[answer.arm].answered += 1
        question = videos[answer.video].questions.setdefault(
            answer.id, _Question(answer.question, answer.type, answer.truth)
        )
        question.answers[answer.arm] = {"text": answer.answer, "right": right, "notes": _notes(answer)}
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    # The page allows only this style and this script, so an unescaped text could not run.
    style, script = (_TEMPLATES.joinpath(f"browse.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("browse.html.jinja").render(
        title=title,
        right_means=_RIGHT_MEANS[metric],
        arms=list(arms.values()),
        types=sorted({answer.type for answer in answers}),
        question_count=sum(len(video.questions) for video in videos.values()),
        videos=[
            {"name": video.name, "source": video.source, "questions": list(video.questions.values())}
            for video in videos.values()
        ],
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
    )


def _in_order(arms: set[str]) -> list[str]:
    """The known arms first, in their order, then the video in more and more chunks."""
    known = (*ARMS, *DROPPING_ARMS)
    rest = sorted(arms - set(known), key=lambda arm: (chunks_of(arm) or 0, arm))
    return [*(arm for arm in known if arm in arms), *rest]


def _meaning(arm: str) -> str:
    if chunks_of(arm) is not None:
        return f"the question alone, under the adapter of the video in {arm}"
    return _ARM_MEANS.get(arm, "")


def _notes(answer: AnswerRecord) -> list[str]:
    notes = [f"F1 {answer.f1:.2f}"] if answer.f1 > 0 and not answer.exact_match else []
    if answer.judge is not None:
        notes.append(f"judge {answer.judge:g}")
    notes.append(f"{answer.prompt_tokens} tokens")
    if answer.ttft_ms is not None:
        notes.append(f"{answer.ttft_ms:.0f} ms")
    return notes


def _file_name(index: int, path: Path) -> str:
    """A name that is safe in any URL and on any disk; its number makes it unique."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-")[:60]
    suffix = re.sub(r"[^a-z0-9.]", "", path.suffix.lower())
    return f"{index:04d}-{stem}{suffix}" if stem else f"{index:04d}{suffix}"


def _hash(text: str) -> str:
    """The hash by which a content security policy names an inline style or script."""
    return "sha256-" + b64encode(sha256(text.encode()).digest()).decode()
