"""Which videos of a manifest can be used: every distinct file is inspected once, and the bad ones get a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from f2l_vllm.train.data.clips import MISSING, UnusableVideoError, check_complete, frames_of, unusable
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.video.probe import Limits, VideoInfo
from f2l_vllm.video.sample import open_source

INSPECT_SECONDS = 60.0
_MOST_WORKERS = 16

OnProgress = Callable[[int, int], None]  # videos done, videos in all


@dataclass(frozen=True)
class Rejection:
    """Examples that were left out, and why.

    Attributes:
        video: the file.
        ids: of the examples.
        reason: a code and a sentence.
    """

    video: Path
    ids: tuple[str, ...]
    reason: str

    def to_row(self) -> dict[str, Any]:
        """As a line of a JSONL report."""
        return {"video": str(self.video), "ids": list(self.ids), "reason": self.reason}


def inspect_video(path: Path, limits: Limits) -> VideoInfo:
    """Inspect a file of unknown origin: first in a process with limited memory and time, then all its packets.

    Returns:
        The header, with the frames as they are shown.

    Raises:
        UnusableVideoError: what is wrong with it.
    """
    if not path.is_file():
        raise UnusableVideoError(MISSING, f"There is no file {path}.")
    command = (sys.executable, "-m", "f2l_vllm.video.inspect", str(path), json.dumps(asdict(limits)))
    try:
        process = subprocess.run(command, capture_output=True, timeout=INSPECT_SECONDS, check=False)
        answer = json.loads(process.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise UnusableVideoError(
            "not_a_video", "The file's header cannot be read in reasonable time and memory; convert it to H.264."
        ) from error
    if "code" in answer:
        raise UnusableVideoError(answer["code"], answer["message"])
    with unusable(path):
        source = open_source(path, limits)
        check_complete(source)
    return source.info


def inspect_videos(
    paths: Iterable[Path], limits: Limits | None = None, on_progress: OnProgress | None = None
) -> dict[Path, VideoInfo | UnusableVideoError]:
    """Inspect every distinct file once, several at a time; returns each file's header, or what is wrong with it."""
    distinct = list(dict.fromkeys(paths))

    def look(path: Path) -> VideoInfo | UnusableVideoError:
        try:
            return inspect_video(path, limits or Limits())
        except UnusableVideoError as error:
            return error

    found: dict[Path, VideoInfo | UnusableVideoError] = {}
    with ThreadPoolExecutor(min(_MOST_WORKERS, os.cpu_count() or 1)) as pool:
        for path, result in zip(distinct, pool.map(look, distinct), strict=True):
            found[path] = result
            if on_progress:
                on_progress(len(found), len(distinct))
    return found


def inspect_examples(
    examples: Sequence[Example], limits: Limits | None = None, on_progress: OnProgress | None = None
) -> tuple[list[Example], list[Rejection]]:
    """The examples whose videos can be used and whose spans lie inside them, in order; and why the others cannot.

    Damage that shows neither in the header nor in the packets is only found by decoding.
    """
    found = inspect_videos((example.video_path for example in examples), limits, on_progress)
    good: list[Example] = []
    bad: dict[tuple[Path, str], list[str]] = {}
    for example in examples:
        result = found[example.video_path]
        try:
            if isinstance(result, UnusableVideoError):
                raise result
            if example.span is not None:
                frames_of(example.span, result)
            good.append(example)
        except UnusableVideoError as error:
            bad.setdefault((example.video_path, str(error)), []).append(example.id)
    return good, [Rejection(video, tuple(ids), reason) for (video, reason), ids in bad.items()]
