"""Which videos of a manifest can be used: every distinct file is inspected once, and the bad ones get a reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2l_vllm.train.data.clips import MISSING, UnusableVideoError, check_complete, frames_of, unusable
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.video.decoder import DecodeLimits, IsolatedDecoder
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import Limits, VideoInfo
from f2l_vllm.video.sample import open_source

INSPECT_SECONDS = 20.0  # of CPU time; twice as long on the clock
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
    with unusable(path):
        with closing(IsolatedDecoder(DecodeLimits(seconds=INSPECT_SECONDS))) as decoder:
            try:
                decoder.probe(path, limits)
            except VideoError as error:
                if error.code not in ("decode_failed", "video_too_large_to_decode"):
                    raise
                message = "The file's header cannot be read in reasonable time and memory; convert it to H.264."
                raise UnusableVideoError("not_a_video", message) from error
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
