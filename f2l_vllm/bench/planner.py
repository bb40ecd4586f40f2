"""Adapter, KV cache or frames: the cost of each, from measured times, for given numbers of questions and videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from f2l_vllm.bench.break_even import questions as break_even
from f2l_vllm.evaluation import environment

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of a checkout; an installed package has none
ADAPTER, KV, FRAMES = "adapter", "kv", "frames"
# The arms that measured the first token of a way's first question about a video, and of each later question.
_ARMS = {ADAPTER: ("adapter-cold", "adapter"), KV: ("frames", "frames-cached"), FRAMES: ("frames", "frames")}
_USUAL_RESOLUTION = 384


@dataclass(frozen=True)
class Need:
    """The task: `questions` about each of `videos` of `frames` each, with `memory` bytes to keep the videos in."""

    frames: int
    questions: int
    videos: int
    memory: float


@dataclass(frozen=True)
class Way:
    """One way and what it costs.

    Attributes:
        first_s, later_s: time to the first token of the first question about a video, and of one whose video is kept.
        total_s: of all questions.
        state_bytes: of all videos; `kept`: the part of them that the memory holds.
        arithmetic: how the total and the state are computed.
    """

    way: str
    first_s: float
    later_s: float
    total_s: float
    state_bytes: float
    kept: float
    arithmetic: tuple[str, ...]


class Measured:
    """The tables of the suite `latency` for one model.

    Args:
        files: result files; only the resolution nearest to `resolution` is read.

    Raises:
        ValueError: a file is not such a result, or there is nothing measured in the files.
    """

    def __init__(self, files: Sequence[Path], resolution: int | None = None) -> None:
        self.files = tuple(files)
        rows: list[dict[str, Any]] = []
        for path in files:
            try:
                result = json.loads(path.read_text())
                of = {"model": result["configuration"]["model"], "machine": result["machine"]}
                rows += [{**row, **of} for row in result["rows"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no result of 'f2l-vllm bench latency': {error}") from error
        timed = [row for row in rows if row.get("ttft_ms") and "state_bytes" in row]
        if not timed:
            raise ValueError(f"nothing was timed in {', '.join(map(str, files)) or 'no file'}")
        models = sorted({row["model"] for row in timed})
        if len(models) > 1:
            raise ValueError(f"the tables are of several models ({', '.join(models)}): name those of one")
        self.model = models[0]
        self.machine = ", ".join(dict.fromkeys(environment.name(row["machine"]) for row in timed))
        self.resolution = min(
            {row["resolution"] for row in timed}, key=lambda edge: abs(edge - (resolution or _USUAL_RESOLUTION))
        )
        self._rows = [row for row in timed if row["resolution"] == self.resolution]

    def has(self, arm: str) -> bool:
        """Whether the arm was timed."""
        return any(row["arm"] == arm for row in self._rows)

    def frames(self) -> list[int]:
        """Numbers of frames that were timed."""
        return sorted({row["frames"] for row in self._rows})

    def seconds(self, arm: str, frames: int) -> float:
        """Time to the first token: measured, or interpolated between the two nearest measured numbers of frames;
        beyond them on the line through the last two, or in proportion if only one was measured."""
        points = sorted((row["frames"], row["ttft_ms"]["median"] / 1e3) for row in self._rows if row["arm"] == arm)
        if len(points) == 1:
            (count, value) = points[0]
            return float(value if arm == "adapter" else value * frames / count)
        counts, values = zip(*points, strict=True)
        place = int(np.clip(np.searchsorted(counts, frames), 1, len(counts) - 1))
        (x0, x1), (y0, y1) = counts[place - 1 : place + 1], values[place - 1 : place + 1]
        return float(max(y0 + (y1 - y0) * (frames - x0) / (x1 - x0), min(values)))

    def state_bytes(self, arm: str, frames: int) -> float:
        """State of one video: an adapter has one size, a KV cache grows with the frames."""
        row = next(row for row in self._rows if row["arm"] == arm)
        return float(row["state_bytes"] if arm == "adapter" else row["state_bytes"] * frames / row["frames"])


def tables(shape: str, machine: Mapping[str, Any]) -> list[Path]:
    """The tables of a shape in `benchmarks/results` that were measured on a machine like this one: those that
    `f2l-vllm doctor --gpu-check` wrote in its folder, or those of this repository.

    Args:
        machine: as `environment.machine` describes it.

    Raises:
        ValueError: there are none, or they are of another machine; the message says how to measure them.
    """
    name = f"latency-{shape}.json"
    of_machine, of_repository = RESULTS / environment.folder_name(machine) / name, RESULTS / name
    if of_machine.exists():
        return [of_machine]
    measure = f"measure with 'f2l-vllm bench latency --shape {shape} --json FILE' and give --measured FILE"
    if not of_repository.exists():
        there = sorted(path.stem.removeprefix("latency-") for path in RESULTS.glob("latency-*.json"))
        raise ValueError(
            f"there is no table of the shape {shape!r} here ({', '.join(there) or 'none at all'}): {measure}"
        )
    measured, here = Measured([of_repository]).machine, environment.name(machine)
    if measured != here:
        raise ValueError(
            f"the table of {shape} was measured on {measured}, and this is {here}: {measure}; to plan for {measured}, "
            f"give --measured {of_repository}"
        )
    return [of_repository]


def plan(measured: Measured, need: Need) -> dict[str, Any]:
    """Compare the ways that were measured.

    Returns:
        as JSON: `ways`, the cheapest first; `best`; `break_even`, the number of questions per video after which the
        adapter has cost no more than another way with the same memory; `assumptions`.

    Raises:
        ValueError: the tables hold fewer than two ways.
    """
    ways = [_way(name, measured, need) for name, arms in _ARMS.items() if all(measured.has(arm) for arm in arms)]
    if len(ways) < 2:
        raise ValueError(
            "the tables need the arms adapter, adapter-cold and frames, and frames-cached for KV caches: measure them "
            "with 'f2l-vllm bench latency'"
        )
    ways.sort(key=lambda way: way.total_s)
    return {
        "model": measured.model,
        "machine": measured.machine,
        "need": asdict(need),
        "resolution": measured.resolution,
        "measured": [str(path) for path in measured.files],
        "measured_frames": measured.frames(),
        "ways": [asdict(way) for way in ways],
        "best": ways[0].way,
        "break_even": _break_even(ways),
        "assumptions": _assumptions(measured, need, ways),
    }


def _way(name: str, measured: Measured, need: Need) -> Way:
    first_arm, later_arm = _ARMS[name]
    first, later = measured.seconds(first_arm, need.frames), measured.seconds(later_arm, need.frames)
    each = 0.0 if name == FRAMES else measured.state_bytes(later_arm, need.frames)
    state = each * need.videos
    kept = min(1.0, need.memory / state) if state else 1.0
    again = need.videos * (need.questions - 1)
    sums = [f"first questions: {need.videos} x {first:.3f} s = {need.videos * first:,.1f} s"]
    total = need.videos * first
    if name == KV:
        hits, misses = again * kept, again * (1 - kept)
        total += hits * later + misses * first
        sums.append(f"later ones of kept videos: {hits:,.0f} x {later:.3f} s = {hits * later:,.1f} s")
        if misses:
            sums.append(f"later ones of videos read again: {misses:,.0f} x {first:.3f} s = {misses * first:,.1f} s")
    else:
        total += again * later
        sums.append(f"later ones: {again:,} x {later:.3f} s = {again * later:,.1f} s")
    sums.append(f"all: {total:,.1f} s, {total / (need.videos * need.questions):.3f} s a question")
    if each:
        sums.append(
            f"state: {need.videos} x {each / 1e6:,.1f} MB = {state / 1e9:,.2f} GB; {need.memory / 1e9:,.2f} GB hold "
            f"{int(need.memory // each):,} videos"
        )
    return Way(name, round(first, 4), round(later, 4), round(total, 3), state, round(kept, 4), tuple(sums))


def _break_even(ways: Sequence[Way]) -> dict[str, int | None]:
    adapter = next((way for way in ways if way.way == ADAPTER), None)
    if adapter is None:
        return {}
    found = {}
    for other in ways:
        if other is not adapter:
            later = other.kept * other.later_s + (1 - other.kept) * other.first_s  # with as much memory
            found[other.way] = break_even(adapter.first_s, adapter.later_s, other.first_s, later)
    return found


def _assumptions(measured: Measured, need: Need, ways: Sequence[Way]) -> list[str]:
    told = ["one question at a time, every video asked equally often; times are medians of the tables"]
    counts = measured.frames()
    if need.frames not in counts:
        where = "between" if counts[0] < need.frames < counts[-1] else "beyond"
        told.append(f"{need.frames} frames lie {where} those measured ({', '.join(map(str, counts))}): a straight line")
    if any(way.way == ADAPTER and way.kept < 1 for way in ways):
        told.append("adapters beyond the memory are read from disk again when asked, which is not in the times")
    return told
