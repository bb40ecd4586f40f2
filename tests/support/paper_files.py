"""Annotations of the paper's data sets in their published layouts, made up, for as many videos as are there."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLES = ("short", "detailed", "camera", "background", "main_object")
ASPECTS = ("caption", "events", "objects", "spatial", "temporal")


def write_annotations(name: str, folder: Path, videos: Sequence[str]) -> Path:
    """The annotations of a set about these videos (names without endings): what `paper prepare` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    return _WRITERS[name](folder, videos)


def _json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _captions(folder: Path, videos: Sequence[str]) -> Path:
    times = {"duration": 8.0, "timestamps": [[0, 3.5], [3.0, 8.0]], "sentences": ["A shape moves.", " It stops."]}
    return _json(folder / "val_1.json", dict.fromkeys(videos, times))


def _rdcap(folder: Path, videos: Sequence[str]) -> Path:
    dense = [
        {"start_frame": 0, "end_frame": 5, "caption": "A circle."},
        {"start_frame": 6, "end_frame": 9, "caption": "It grows."},
    ]
    return _lines(
        folder / "rdcap.jsonl",
        [{"uid": i, "video": f"{v}.mp4", "masklet_id": 0, "dense_captions": dense} for i, v in enumerate(videos)],
    )


def _rcap(folder: Path, videos: Sequence[str]) -> Path:
    frames = {"masklet_id": 0, "total_frames": 12, "start_frame": 0, "end_frame": 5}
    return _lines(
        folder / "rcap.jsonl",
        [{"uid": i, "video": f"{v}.mp4", "caption": "A red circle.", **frames} for i, v in enumerate(videos)],
    )


def _sgqa(folder: Path, videos: Sequence[str]) -> Path:
    rows = [
        {"uid": i, "video": f"{v}.mp4", "question": "What is there?", "answer": "A circle.", "domain": "a"}
        for i, v in enumerate(videos)
    ]
    return _lines(folder / "sgqa.jsonl", rows)


def _vdc(folder: Path, videos: Sequence[str]) -> Path:
    for style in STYLES:
        _json(folder / f"{style}.json", [{"video_name": video, "caption": f"{style} of it."} for video in videos])
    return folder


def _carebench(folder: Path, videos: Sequence[str]) -> Path:
    rows = [
        {"video": f"{video}.mp4", **dict.fromkeys(ASPECTS, "A circle."), "events": ["It comes", "it goes"]}
        for video in videos
    ]
    return _json(folder / "carebench.json", rows)


def _nextqa(folder: Path, videos: Sequence[str]) -> Path:
    with (folder / "test.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["video", "frame_count", "width", "height", "question", "answer", "qid", "type"])
        table.writerows([video, 10, 64, 48, "what is red", "circle", 0, "DO"] for video in videos)
    return folder / "test.csv"


def _activitynet_qa(folder: Path, videos: Sequence[str]) -> Path:
    asked = [{"video_name": v, "question": "is it red", "question_id": f"v_{v}_1"} for v in videos]
    _json(folder / "test_q.json", asked)
    _json(folder / "test_a.json", [{"answer": "yes", "type": 3, "question_id": f"v_{v}_1"} for v in videos])
    return folder


def _vidcapbench(folder: Path, videos: Sequence[str]) -> Path:
    pairs = [
        {"question": "Is it red?", "answer": "Yes.", "sub_category": 1},
        {"question": "What is it?", "answer": "A circle.", "sub_category": 2},
    ]
    return _lines(
        folder / "VidCapBench-AE_QA.jsonl", [{"video_dir": f"videos/{v}.mp4", "QA_pairs": pairs} for v in videos]
    )


_WRITERS = {
    "activitynet-captions": _captions,
    "plm-rdcap": _rdcap,
    "plm-rcap": _rcap,
    "vdc": _vdc,
    "carebench": _carebench,
    "nextqa": _nextqa,
    "activitynet-qa": _activitynet_qa,
    "plm-sgqa": _sgqa,
    "vidcapbench": _vidcapbench,
}
