"""What making an adapter costs, stage by stage: seconds, and memory above the weights.

A real mp4 is decoded and read, and the adapter is exported. Memory is the high-water mark within each stage, above what
is held with everything loaded and before the video is opened. It is taken in another pass: to restart the mark, 64
times, the kernel goes through all pages of the process, which would be most of the perceiver's seconds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from f2l_vllm.bench import record
from f2l_vllm.hypernetwork.adapter import Adapter
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.hypernetwork.perceiver import LayerReader
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.video.sample import Sampling


class Peaks:
    """The high-water mark of every stage, in MiB above what is held before: of this process, or of torch on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = self._restart()
        self.peak_mib: dict[str, float] = {}

    def _restart(self) -> float:
        """Count from here on, and return the MiB held now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device) / 2**20
        return record.restart_high_water_mark()

    def _peak(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return record.peak_memory_mib(os.getpid())

    def around(self, stage: str, between: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its peak counted as `stage` and that of what ran before it as `between`."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.lap(between)
            result = function(*args, **kwargs)
            self.lap(stage)
            return result

        return watched

    def lap(self, stage: str) -> None:
        """What ran since the last lap was `stage`."""
        peak = self._peak() - self._base
        self.peak_mib[stage] = round(max(self.peak_mib.get(stage, 0.0), peak), 1)
        self._restart()


def of_frames(internalizer: Internalizer, folder: Path, frames: Sequence[int]) -> dict[str, Any]:
    """What `measure` finds for videos of so many frames, by their number."""
    warm_up(internalizer, folder)
    found = {}
    for count in frames:
        video = film(folder, count)
        internalizer.sampling = Sampling(max_frames=count, fps=1)
        taken = [seconds_of(internalizer, video, folder / f"adapter-{count}")]
        found[f"{count} frames"] = measure(internalizer, video, folder / f"adapter-{count}-again", taken)
    return found


def film(folder: Path, frames: int, size: tuple[int, int] = (640, 360)) -> Path:
    """A video of so many seconds, of which a frame a second is read."""
    scene = sample_scenes(1, seed=frames)[0]
    return write_mp4(scene, folder / f"{frames}.mp4", size=size, fps=4, seconds=frames)


def warm_up(internalizer: Internalizer, folder: Path) -> None:
    """Have every weight read from its file and every library set up."""
    for parameter in internalizer.model.parameters():
        parameter.sum()
    internalizer.sampling = Sampling(max_frames=1)
    internalizer.internalize(write_mp4(sample_scenes(1, seed=0)[0], folder / "short.mp4", fps=4, seconds=1))


def seconds_of(internalizer: Internalizer, video: Path, target: Path) -> dict[str, float]:
    """One video, from file to adapter: seconds of every stage."""
    adapter = internalizer.internalize(video)
    started = time.perf_counter()
    adapter.save(target, base_model=internalizer.hyper.config.base_model)
    return {**adapter.info.seconds, "export": time.perf_counter() - started}


def measure(internalizer: Internalizer, video: Path, target: Path, taken: list[dict[str, float]]) -> dict[str, Any]:
    """The medians of the seconds that were taken, and what the same video needs of memory."""
    seconds = {stage: statistics.median(one[stage] for one in taken) for stage in taken[0]}
    adapter, peaks = peaks_of(internalizer, video, target)
    tokens = adapter.info.prompt_tokens
    hidden = tokens * internalizer.hyper.config.feature_size * next(internalizer.model.parameters()).element_size()
    return {
        "frames": adapter.info.frames,
        "prompt_tokens": tokens,
        "rank": adapter.rank,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "seconds_in_all": round(sum(seconds.values()), 3),
        "peak_above_weights_mib": peaks,
        "text_peak_in_hidden_vectors_per_token": round(peaks["text"] * 2**20 / hidden, 1),
    }


def peaks_of(internalizer: Internalizer, video: Path, target: Path) -> tuple[Adapter, dict[str, float]]:
    """The adapter, and the stages' peaks in MiB above what the process holds before."""
    encoder, hyper = internalizer.encoder, internalizer.hyper
    peaks = Peaks(internalizer.device)
    watched: dict[tuple[Any, str], tuple[str, str]] = {
        (encoder, "see"): ("vision", "decode"),
        (LayerReader, "add"): ("perceiver", "text"),
        (LayerReader, "latents"): ("perceiver", "text"),
        (hyper, "project"): ("head", "perceiver"),
    }
    with ExitStack() as stack:
        for (owner, name), (stage, before) in watched.items():
            function = peaks.around(stage, before, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, function))
        adapter = internalizer.internalize(video)
    adapter.save(target, base_model=hyper.config.base_model)
    peaks.lap("export")
    return adapter, peaks.peak_mib
