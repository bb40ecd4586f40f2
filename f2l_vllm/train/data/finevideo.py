"""Manifests of spans from FineVideo's metadata: single scenes, adjacent scenes and whole videos.

Source of the data: HuggingFaceFV/finevideo, saved as its card shows: two folders hold one JSON file and one mp4 file of
the same name per video. Two fields of each JSON are read: `content_metadata` (description, and scenes with timestamps,
a title and activities) and `original_video_filename` (the video's id at its origin). Speech is left out: no model here
hears.

Source of the shares: Frames2LoRA (arXiv 2606.04351), training data.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2l_vllm.train.data.clips import UnusableVideoError, frames_of
from f2l_vllm.train.data.inspection import OnProgress, Rejection, inspect_videos
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.video.probe import VideoInfo

DATASET = "finevideo"
SCENE, ADJACENT, WHOLE = "scene", "adjacent", "whole"
SHARES = {SCENE: 0.6, ADJACENT: 0.3, WHOLE: 0.1}
PROMPTS: dict[str, tuple[str, ...]] = {
    "caption": (
        "Describe what happens in this video.",
        "What can be seen in this clip?",
        "Write a caption for this video.",
        "Describe the scene.",
    ),
    "summary": (
        "Summarize this video.",
        "Give a short summary of what happens.",
        "What is this video about, from its beginning to its end?",
        "Tell in a few sentences what this video shows.",
    ),
}
_TASKS = {SCENE: "caption", ADJACENT: "summary", WHOLE: "summary"}
_ADJACENT_SCENES = (2, 3)
_ROUNDING_S = 1.0  # labels are rounded to seconds: a scene may run past the video's end, or the next start, by this
_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")
_AT_ONCE = 1000  # videos whose metadata is held in memory
_SPLIT_PERCENT = {"test": 2, "validation": 2}  # of the videos; all others are for training


@dataclass(frozen=True)
class _Scene:
    index: int
    start: float
    end: float
    title: str
    text: str


@dataclass(frozen=True)
class _Video:
    """One entry of the dataset before its file is looked at."""

    video_id: str
    path: Path
    content: dict[str, Any]
    category: str


def build_manifest(
    metadata_folder: Path,
    video_folder: Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[list[Example], list[Rejection]]:
    """Spans in the shares of `SHARES`; the same arguments and files give the same spans.

    There are as many spans as the shares allow without taking one twice, but at most `limit`. A video's split depends
    only on a hash of its id.

    Args:
        metadata_folder: JSON files, at any depth.
        video_folder: mp4 files of the same relative names, or of the name that the metadata gives.
        on_progress: called with the number of metadata files read and of all; with `limit`, not all may be needed.

    Returns:
        The examples, grouped by video, and the videos and scenes that were left out, with reasons.

    Raises:
        ValueError: no metadata, or not a single span that could be used.
    """
    paths = sorted(metadata_folder.rglob("*.json"))
    if not paths:
        raise ValueError(f"{metadata_folder} holds no .json file; name the folder of FineVideo's metadata.")
    rng = random.Random(f"finevideo:{seed}")
    rng.shuffle(paths)
    rejections: list[Rejection] = []
    pools: dict[str, list[Example]] = {kind: [] for kind in SHARES}
    seen: set[str] = set()
    at_once = min(limit or _AT_ONCE, _AT_ONCE)  # a video mostly gives several spans, so `limit` videos mostly suffice
    for first in range(0, len(paths), at_once):
        videos = _read_all(paths[first : first + at_once], metadata_folder, video_folder, seen, rejections)
        if on_progress:
            on_progress(first, len(paths))
        infos = inspect_videos(video.path for video in videos)
        for video in videos:
            info = infos[video.path]
            if isinstance(info, UnusableVideoError):
                rejections.append(Rejection(video.path, (video.video_id,), str(info)))
                continue
            scenes, reasons = _scenes(video.content, info)
            rejections += [
                Rejection(video.path, (f"{video.video_id}-scene-{index}",), reason) for index, reason in reasons
            ]
            for kind, example in _spans(video, scenes, seed):
                pools[kind].append(example)
        if limit is not None and all(len(pools[kind]) >= count for kind, count in _counts(limit).items()):
            break
    total = sum(map(len, pools.values())) if limit is None else limit
    while any(count > len(pools[kind]) for kind, count in _counts(total).items()):
        total -= 1
    if total == 0:
        found = ", ".join(f"{len(pool)} {kind}" for kind, pool in pools.items())
        raise ValueError(
            f"Too few spans for the shares of {SHARES} ({found}); {len(rejections)} videos and scenes were left out"
            + (f", e.g. {rejections[0].video}: {rejections[0].reason}" if rejections else ".")
        )
    examples = [example for kind, count in _counts(total).items() for example in rng.sample(pools[kind], count)]
    return sorted(examples, key=lambda example: example.id), rejections


def split_of(video_id: str) -> str:
    """`train`, `validation` or `test`: always the same for a video."""
    place = int.from_bytes(hashlib.sha256(f"{DATASET}:{video_id}".encode()).digest()[:8], "big") % 100
    for split, percent in _SPLIT_PERCENT.items():
        if place < percent:
            return split
        place -= percent
    return "train"


def seconds_of(timestamp: Any) -> float | None:
    """Seconds of `[HH:]MM:SS[.mmm]`, or None for anything else."""
    match = _TIME.fullmatch(timestamp.strip()) if isinstance(timestamp, str) else None
    if match is None:
        return None
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)


def _counts(total: int) -> dict[str, int]:
    counts = {kind: int(total * share) for kind, share in SHARES.items()}
    counts[SCENE] += total - sum(counts.values())
    return counts


def _read_all(
    paths: list[Path], metadata_folder: Path, video_folder: Path, seen: set[str], rejections: list[Rejection]
) -> list[_Video]:
    """The entries that can be read and whose ids are not in `seen`; adds to `seen` and to `rejections`."""
    videos = []
    for path in paths:
        try:
            video = _read(path, path.relative_to(metadata_folder), video_folder)
            if video.video_id in seen:
                raise ValueError(f"repeated_video: {video.video_id} has been read from another file.")
        except ValueError as error:
            rejections.append(Rejection(path, (path.stem,), str(error)))
            continue
        seen.add(video.video_id)
        videos.append(video)
    return videos


def _read(path: Path, relative: Path, video_folder: Path) -> _Video:
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"bad_metadata: the file is no JSON ({error}).") from error
    content = entry.get("content_metadata") if isinstance(entry, dict) else None
    if not isinstance(content, dict):
        raise ValueError("bad_metadata: there is no content_metadata, as FineVideo's JSON files have it.")
    name = Path(_words(entry.get("original_video_filename"))).name
    candidates = [video_folder / relative.with_suffix(".mp4"), *([video_folder / name] if name else [])]
    video = next((candidate for candidate in candidates if candidate.is_file()), None)
    if video is None:
        tried = " or ".join(str(candidate) for candidate in candidates)
        raise ValueError(f"file_not_found: there is no {tried}.")
    category = _words(entry.get("content_parent_category"))
    return _Video(Path(name).stem or relative.with_suffix("").as_posix(), video, content, category)


def _scenes(content: dict[str, Any], info: VideoInfo) -> tuple[list[_Scene], list[tuple[int, str]]]:
    """The scenes with usable times, and (index, reason) of the others."""
    listed, duration = content.get("scenes"), info.frame_count / info.fps
    good: list[_Scene] = []
    bad: list[tuple[int, str]] = []
    for index, scene in enumerate(listed if isinstance(listed, list) else []):
        try:
            times = scene.get("timestamps") if isinstance(scene, dict) else None
            times = times if isinstance(times, dict) else {}
            start, end = (seconds_of(times.get(f"{name}_timestamp")) for name in ("start", "end"))
            if start is None or end is None:
                raise ValueError("missing_timestamps: the scene has no start_timestamp and end_timestamp to be read.")
            if start >= end:
                raise ValueError(f"reversed_timestamps: the scene starts at {start:g} s and ends at {end:g} s.")
            if end > duration + _ROUNDING_S or start >= duration:
                raise ValueError(f"beyond_duration: the scene ends at {end:g} s of a video of {duration:.2f} s.")
            if good and start < good[-1].end - _ROUNDING_S:
                raise ValueError(
                    f"overlapping_scenes: the scene starts at {start:g} s, scene {good[-1].index} ends at "
                    f"{good[-1].end:g} s."
                )
            frames_of((start, min(end, duration)), info)
        except ValueError as error:
            bad.append((index, str(error)))
            continue
        title = _words(scene.get("title"))
        activities = scene.get("activities")
        done = [
            _sentence(activity.get("description"))
            for activity in (activities if isinstance(activities, list) else [])
            if isinstance(activity, dict)
        ]
        text = " ".join(sentence for sentence in done if sentence) or _sentence(title)
        good.append(_Scene(index, start, min(end, duration), title, text))
    return good, bad


def _spans(video: _Video, scenes: list[_Scene], seed: int) -> Iterator[tuple[str, Example]]:
    for scene in scenes:
        yield SCENE, _example(video, SCENE, [scene], scene.text, seed)
    for count in _ADJACENT_SCENES:
        for first in range(len(scenes) - count + 1):
            some = scenes[first : first + count]
            if some[-1].index - some[0].index == count - 1:  # no scene that was left out lies between
                texts = [scene.text for scene in some]
                yield ADJACENT, _example(video, ADJACENT, some, " ".join(texts) if all(texts) else "", seed)
    yield WHOLE, _example(video, WHOLE, [], _sentence(video.content.get("description")), seed)


def _example(video: _Video, kind: str, scenes: list[_Scene], target: str, seed: int) -> Example:
    task = _TASKS[kind]
    where = f"-{scenes[0].index:03d}-{scenes[-1].index:03d}" if scenes else ""
    name = f"{DATASET}-{video.video_id}{where}"
    metadata: dict[str, Any] = {
        "span": kind,
        "video_id": video.video_id,
        "category": video.category,
        "titles": [scene.title for scene in scenes] or [_words(video.content.get("title"))],
    }
    if scenes:
        metadata |= {"start": scenes[0].start, "end": scenes[-1].end}
    return Example(
        id=name,
        video_path=video.path,
        prompt=random.Random(f"{seed}:{name}").choice(PROMPTS[task]),
        target_text=target,
        task_type=task,
        dataset=DATASET,
        split=split_of(video.video_id),
        metadata=metadata,
    )


def _words(text: Any) -> str:
    """The text on one line; empty for anything that is not text."""
    return " ".join(text.split()) if isinstance(text, str) else ""


def _sentence(text: Any) -> str:
    words = _words(text)
    return words if not words or words[-1] in ".!?" else f"{words}."
