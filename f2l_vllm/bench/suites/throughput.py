"""Many videos asked at once: requests a second, percentiles, and goodput."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from f2l_vllm.bench import metrics, trace
from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.arms import ARMS, Arm
from f2l_vllm.bench.askers import Askers
from f2l_vllm.bench.intervals import Interval, of_each, of_rounds
from f2l_vllm.bench.results_file import ResultsFile, Row, Say
from f2l_vllm.bench.running import RunningServer
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.client import Answer

_RATES = ("request_throughput", "output_throughput", "request_goodput")


async def run(
    suite: suites.Throughput, subject: Subject | RunningServer, folder: Path, results: ResultsFile, say: Say
) -> None:
    """Measure every popularity and concurrency; in each round the arms take turns over the same trace.

    Rows hold the keys of `vllm bench serve` over all rounds, and some of each round's in `rounds`.

    Raises:
        ServerFailed, APIError, WrongAnswer: a server did not start, or did not answer as asked.
    """
    arms = [ARMS[name] for name in suite.arms]
    kept = suite.videos if any(arm.warmed for arm in arms) else 0
    room = {"sequences": max(suite.concurrency), "frames": suite.frames, "videos": suite.videos, "kept": kept}
    todo = [
        (popularity, concurrency)
        for popularity in suite.popularity
        for concurrency in suite.concurrency
        if not results.has(popularity=popularity, concurrency=concurrency)
    ]
    if not todo:
        return
    async with Askers(suite, subject, folder, **room) as askers:
        results.note(servers=askers.described())
        await askers.prepare()
        videos = [
            await asyncio.to_thread(askers.films.make, suite.frames, suite.resolution, suite.seed, number)
            for number in range(suite.videos)
        ]
        for arm in arms:
            await _know(arm, askers, videos, suite, say)
        for popularity, concurrency in todo:
            found: dict[str, list[tuple[list[Answer], float]]] = {arm.name: [] for arm in arms}
            for number in range(suite.rounds):
                whole = _trace(suite, popularity, number)
                for arm in askers.turn(number):
                    known = arm.warmed or arm.reads != "frames"
                    asked = whole[: suite.requests if known else suite.frames_requests]
                    answers, seconds = await _replay(arm, askers, videos, asked, suite, concurrency)
                    found[arm.name].append((answers, seconds))
                    rate = len(answers) / seconds
                    say(f"{popularity}, {concurrency} at a time, {arm.name}: {rate:.3g} requests/s")
            results.add(*(_row(suite, popularity, concurrency, name, some) for name, some in found.items()))


def derive(rows: list[Row]) -> dict[str, Any]:
    """`rows` with `n` answers and the intervals of the rates over rounds; `ratios`: requests per second of the adapter
    arm over every other arm's, and their first token over its, paired by rounds."""
    rows = [
        row
        | of_each([{name: one[name] for name in _RATES if name in one} for one in row["rounds"]], of_rounds)
        | _n(row)
        for row in rows
    ]
    ratios = []
    for adapter in (row for row in rows if row["arm"] == "adapter"):
        cell = {name: adapter[name] for name in ("videos", "frames", "popularity", "concurrency")}
        for row in rows:
            if row["arm"] != "adapter" and all(row[name] == value for name, value in cell.items()):
                rate = adapter["request_throughput"] / row["request_throughput"]
                first = row["median_ttft_ms"] / adapter["median_ttft_ms"]
                ratios.append(
                    {**cell, "over": row["arm"], "requests": round(rate, 2), "ttft": round(first, 2)}
                    | {"requests_ci95": _paired(adapter, row, "request_throughput")}
                    | {"ttft_ci95": _paired(row, adapter, "median_ttft_ms")}
                )
    return {"rows": rows, "ratios": ratios}


def _n(row: Row) -> dict[str, int]:
    return {"n": row["completed"]} if "completed" in row else {}


def _paired(row: Row, other: Row, figure: str) -> Interval:
    pairs = zip(row["rounds"], other["rounds"], strict=True)
    return of_rounds([mine[figure] / theirs[figure] for mine, theirs in pairs if figure in mine and figure in theirs])


async def _know(arm: Arm, askers: Askers, videos: list[Path], suite: suites.Throughput, say: Say) -> None:
    """Before anything is timed: make and load adapters, and put each video's KV into the cache as far as it fits."""
    if arm.reads == "adapter":
        for first in range(0, len(videos), 8):
            await askers.upload(arm, videos[first : first + 8])
            say(f"{arm.name}: {min(first + 8, len(videos))} of {len(videos)} videos are internalized")
    if arm.warmed:
        for video in videos:
            await askers.ask(arm, video, suite.questions[-1])
        say(f"{arm.name}: {len(videos)} videos were asked about once")


async def _replay(
    arm: Arm,
    askers: Askers,
    videos: list[Path],
    asked: list[trace.Request],
    suite: suites.Throughput,
    concurrency: int,
) -> tuple[list[Answer], float]:
    async def ask(request: trace.Request, arrived: float | None) -> Answer:
        return await askers.ask(arm, videos[request.video], suite.questions[request.question], arrived)

    return await trace.replay(asked, ask, concurrency)


def _trace(suite: suites.Throughput, popularity: trace.Popularity, number: int) -> list[trace.Request]:
    return trace.make(
        max(suite.requests, suite.frames_requests),
        suite.videos,
        len(suite.questions),
        popularity,
        suite.zipf_alpha,
        suite.request_rate,
        suite.seed + number,
    )


def _row(
    suite: suites.Throughput, popularity: str, concurrency: int, arm: str, rounds: list[tuple[list[Answer], float]]
) -> Row:
    answers = [answer for some, _ in rounds for answer in some]
    slo = suite.slo.model_dump(exclude_none=True)
    each = [metrics.rounded(metrics.summary(some, seconds, slo)) for some, seconds in rounds]
    figures = metrics.summary(answers, sum(seconds for _, seconds in rounds), slo)
    return {
        "arm": arm,
        "videos": suite.videos,
        "frames": suite.frames,
        "resolution": suite.resolution,
        "popularity": popularity,
        "concurrency": concurrency,
        "arrivals": suite.arrivals,
        "request_rate": suite.request_rate,
        **metrics.rounded(figures),
        "rounds": [{name: one[name] for name in (*_RATES, "median_ttft_ms") if name in one} for one in each],
    }
