"""Makes a manifest of a set's sample: examples drawn with a seed, each with its video, and what is missing."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2l_vllm.evaluation.paper.readers import Item
from f2l_vllm.evaluation.paper.sets import FRAMES, LONGEST_EDGE, PaperSet, find
from f2l_vllm.files import write_whole
from f2l_vllm.train.data.manifest import Example, write_manifest

MANIFEST, ABOUT, MISSING = "manifest.jsonl", "paper.json", "missing.txt"
_VIDEOS = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv"})
_SHOWN = 10


@dataclass(frozen=True)
class Prepared:
    """What was made of a set."""

    manifest: Path
    examples: int
    missing: tuple[str, ...]


class VideosMissing(ValueError):
    """Videos of the sample are not in the folder; nothing was prepared but the list of them."""


def prepare(
    one: PaperSet,
    annotations: Path,
    videos: Path,
    out: Path,
    *,
    sample: int | None = None,
    seed: int = 0,
    allow_missing: bool = False,
) -> Prepared:
    """Write a manifest with the sample into `out`, with `missing.txt` beside it if videos are missing.

    Args:
        sample: examples of each type; the paper's when None, and all there are if there are fewer.
        seed: which examples. The paper does not state its own.

    Raises:
        ValueError: the annotations are in another layout, or no video is there.
        VideosMissing: some are missing, and `allow_missing` is not set.
    """
    if not annotations.exists():
        raise ValueError(f"{annotations} does not exist: download the annotations from {one.source}")
    if not videos.is_dir():
        raise ValueError(f"{videos} is no folder: name the one with the set's videos")
    items = _check(one.read(annotations), annotations)
    chosen = draw(one, items, sample or one.sample, seed)
    known = _files(videos)
    found = {item.video: known.get(_stem(item.video)) for item in chosen}
    missing = tuple(sorted(video for video, path in found.items() if path is None))
    out.mkdir(parents=True, exist_ok=True)
    if missing:
        write_whole(out / MISSING, "".join(f"{video}\n" for video in missing))
        if len(missing) == len(found) or not allow_missing:
            shown = ", ".join(missing[:_SHOWN]) + (" …" if len(missing) > _SHOWN else "")
            raise VideosMissing(
                f"{len(missing)} of {len(found)} videos are not in {videos}: {shown}. All of them are in "
                f"{out / MISSING}; add them, or allow it (--allow-missing), and the report says so."
            )
    examples = [_example(one, item, path) for item in chosen if (path := found[item.video]) is not None]
    write_manifest(out / MANIFEST, examples)
    about: dict[str, Any] = {
        "set": one.name,
        "annotations": annotations.name,
        "annotations_sha256": _digest(annotations),
        "sample": sample or one.sample,
        "seed": seed,
        "examples": len(examples),
        "examples_drawn": len(chosen),
        "missing": list(missing),
        "frames": FRAMES,
        "longest_edge": LONGEST_EDGE,
    }
    write_whole(out / ABOUT, json.dumps(about, indent=1) + "\n")
    return Prepared(out / MANIFEST, len(examples), missing)


def prepared_set(folder: Path) -> PaperSet:
    """The set that was prepared in a folder."""
    return find(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["set"])


def draw(one: PaperSet, items: Sequence[Item], sample: int, seed: int) -> list[Item]:
    """So many examples of each type, or all examples of so many videos, in the annotations' order."""
    rng = random.Random(f"{one.name}:{seed}")
    if one.by_video:
        videos = sorted({item.video for item in items})
        kept = set(rng.sample(videos, min(sample, len(videos))))
        return [item for item in items if item.video in kept]
    chosen: set[str] = set()
    for kind in one.prompts:
        ids = sorted(item.id for item in items if item.kind == kind)
        chosen |= set(rng.sample(ids, min(sample, len(ids))))
    return [item for item in items if item.id in chosen]


def _check(items: list[Item], annotations: Path) -> list[Item]:
    if not items:
        raise ValueError(f"{annotations} holds no example")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{annotations}: two examples have the id {item.id!r}")
        seen.add(item.id)
    return [item for item in items if item.truth.strip()]


def _example(one: PaperSet, item: Item, video: Path) -> Example:
    metadata = {} if item.span is None else {"start": item.span[0], "end": item.span[1]}
    return Example(item.id, video, one.ask(item), item.truth, item.kind, one.title, "test", metadata)


def _files(folder: Path) -> dict[str, Path]:
    """The videos in a folder and those below it, by their names without endings."""
    return {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _VIDEOS}


def _stem(video: str) -> str:
    name = video.rstrip("/").rpartition("/")[2]
    return name[: -len(suffix)] if (suffix := Path(name).suffix).lower() in _VIDEOS else name


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
