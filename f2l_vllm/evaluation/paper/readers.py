"""Reads the annotations of the paper's data sets, each in the layout in which its publisher has them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PLM_FPS = 6.0  # of the videos that the frames of PLM-VideoBench's regions count
_TABLES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Item:
    """One example.

    Attributes:
        id: unique in its set.
        video: the video's name in the annotations, maybe with an ending or folders.
        kind: the type of the example, a key of its set's prompts.
        span: seconds of the video; None: all of it.
    """

    id: str
    video: str
    kind: str
    truth: str
    question: str = ""
    span: tuple[float, float] | None = None


def activitynet_captions(path: Path) -> list[Item]:
    """Raises ValueError: it is not in this layout; so do all others."""
    found = _json(path)
    if not isinstance(found, dict):
        raise _other(path, "an object by video")
    return [
        Item(video, video, "caption", " ".join(text.strip() for text in _of(one, "sentences", path, list)))
        for video, one in found.items()
    ]


def plm_rdcap(path: Path) -> list[Item]:
    """See `activitynet_captions`."""
    items = []
    for row in _rows(path):
        captions = [str(_of(one, "caption", path, str)).strip() for one in _of(row, "dense_captions", path, Sequence)]
        items.append(Item(f"{_of(row, 'uid', path)}", str(_of(row, "video", path)), "caption", " ".join(captions)))
    return items


def plm_rcap(path: Path) -> list[Item]:
    """See `activitynet_captions`."""
    items = []
    for row in _rows(path):
        span = _of(row, "start_frame", path) / _PLM_FPS, (_of(row, "end_frame", path) + 1) / _PLM_FPS
        name, video = f"{_of(row, 'uid', path)}", str(_of(row, "video", path))
        items.append(Item(name, video, "caption", _of(row, "caption", path, str), span=span))
    return items


def plm_sgqa(path: Path) -> list[Item]:
    """See `activitynet_captions`."""
    return [
        Item(
            f"{_of(row, 'uid', path)}",
            str(_of(row, "video", path)),
            "question",
            _of(row, "answer", path, str),
            _of(row, "question", path, str),
        )
        for row in _rows(path)
    ]


def vdc(path: Path) -> list[Item]:
    """See `activitynet_captions`. `path`: a folder with a file for each style."""
    items = []
    for kind in ("short", "detailed", "camera", "background", "main object"):
        name = kind.replace(" ", "_")
        table = next((found for ending in _TABLES if (found := path / f"{name}{ending}").is_file()), None)
        if table is None:
            raise ValueError(
                f"{path} has no {name}.parquet, {name}.jsonl or {name}.json: name the folder with all five"
            )
        for row in _rows(table):
            video = str(_of(row, "video_name", table))
            items.append(Item(f"{video}/{kind}", video, kind, _of(row, "caption", table, str)))
    return items


def carebench(path: Path) -> list[Item]:
    """See `activitynet_captions`."""
    items = []
    for row in _rows(path):
        video = str(_of(row, "video", path))
        for kind in ("caption", "events", "objects", "spatial", "temporal"):
            truth = _of(row, kind, path)
            truth = "; ".join(str(one) for one in truth) if isinstance(truth, list) else str(truth)
            items.append(Item(f"{video}/{kind}", video, kind, truth))
    return items


def nextqa(path: Path) -> list[Item]:
    """See `activitynet_captions`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        Item(
            f"{_of(row, 'video', path)}_{_of(row, 'qid', path)}",
            _of(row, "video", path, str),
            "question",
            _of(row, "answer", path, str),
            _asked(_of(row, "question", path, str)),
        )
        for row in rows
    ]


def activitynet_qa(path: Path) -> list[Item]:
    """See `activitynet_captions`. `path`: a folder with test_q.json and test_a.json."""
    questions, answers = path / "test_q.json", path / "test_a.json"
    truths = {_of(row, "question_id", answers): _of(row, "answer", answers) for row in _json(answers)}
    items = []
    for row in _json(questions):
        name = _of(row, "question_id", questions)
        if name not in truths:
            raise ValueError(f"{answers} has no answer to the question {name!r} of {questions.name}")
        video, question = str(_of(row, "video_name", questions)), _of(row, "question", questions, str)
        items.append(Item(str(name), video, "question", str(truths[name]), _asked(question)))
    return items


def vidcapbench(path: Path) -> list[Item]:
    """See `activitynet_captions`."""
    items = []
    for row in _rows(path):
        video = str(_of(row, "video_dir", path))
        for number, pair in enumerate(_of(row, "QA_pairs", path, list)):
            question, answer = _of(pair, "question", path, str), _of(pair, "answer", path, str)
            items.append(Item(f"{video}/{number}", video, "question", answer, question))
    return items


def _asked(question: str) -> str:
    """These sets have questions without a mark."""
    question = question.strip()
    return question if question.endswith("?") else f"{question}?"


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a table: parquet, JSON lines, or a JSON array."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"{path} is read by pyarrow: pip install pyarrow, or convert it to JSON lines") from error
        yield from parquet.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    else:
        found = _json(path)
        if not isinstance(found, list):
            raise _other(path, "an array of objects")
        yield from found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def _of(row: Any, name: str, path: Path, kind: type = object) -> Any:
    value = row.get(name) if isinstance(row, Mapping) else None
    if value is None or not isinstance(value, kind):
        have = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{path}: a row has no {name!r} of the kind that is expected there; it has: {have}")
    return value


def _other(path: Path, expected: str) -> ValueError:
    return ValueError(f"{path} is not in the published layout: {expected} is expected")
