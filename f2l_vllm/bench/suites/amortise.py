"""Many questions about one video: the sum of times to the first token, internalization included, and the break-even."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from pathlib import Path
from typing import Any

from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.arms import ARMS, Arm
from f2l_vllm.bench.askers import Askers
from f2l_vllm.bench.break_even import questions as break_even
from f2l_vllm.bench.intervals import of_quantile
from f2l_vllm.bench.results_file import ResultsFile, Row, Say
from f2l_vllm.bench.running import RunningServer
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.evaluation.percentiles import percentiles

_SEQUENCES = 2


async def run(
    suite: suites.Amortise, subject: Subject | RunningServer, folder: Path, results: ResultsFile, say: Say
) -> None:
    """Ask about a fresh video in each round, the same questions in all arms.

    A row per arm: `ttft_ms` of each question, of which `asked` were really asked, and their running sum,
    `cumulative_ttft_ms`, both medians over `rounds`.

    Raises:
        ServerFailed, APIError, WrongAnswer: a server did not start, or did not answer as asked.
    """
    if results.rows:
        return
    arms = [ARMS[name] for name in suite.arms]
    videos = 2 * suite.rounds
    rounds: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    async with Askers(suite, subject, folder, frames=suite.frames, sequences=_SEQUENCES, videos=videos) as askers:
        results.note(servers=askers.described())
        await askers.prepare()
        for number in range(suite.rounds):
            video = await asyncio.to_thread(askers.fresh, suite.frames, suite.resolution)
            for times in rounds.values():
                times.append([])
            for arm, count in _order(askers, suite, number):
                question = suite.questions[count % len(suite.questions)]
                if arm.reads == "adapter" and count == 0:
                    answer = await askers.ask_cold(arm, video, question, keep=True)
                else:
                    answer = await askers.ask(arm, video, question)
                rounds[arm.name][-1].append(answer.ttft * 1e3)
                say(f"question {count + 1}, {arm.name}: first token after {answer.ttft * 1e3:.1f} ms")
    results.add(*(_row(arm, suite, rounds[arm.name]) for arm in arms))


def derive(rows: list[Row]) -> dict[str, Any]:
    """`rows` with their numbers of values and intervals; `break_even`: the number of questions after which an arm that
    reads adapters has cost no more than another.

    `questions` is None if the arm has cost more up to the last question. `projected` extends both arms by the median
    of their later questions, and is None if they never meet.
    """
    rows = [_with_intervals(row) for row in rows]
    found = []
    for ours in rows:
        for other in rows:
            if ours["arm"].startswith("adapter") and other["arm"].startswith("frames"):
                pairs = zip(ours["cumulative_ttft_ms"], other["cumulative_ttft_ms"], strict=True)
                met = next((place + 1 for place, (a, b) in enumerate(pairs) if a <= b), None)
                found.append(
                    {"arm": ours["arm"], "over": other["arm"], "questions": met, "projected": _projected(ours, other)}
                )
    return {"rows": rows, "break_even": found}


def _with_intervals(row: Row) -> Row:
    if "rounds" not in row:
        return row
    later = [value for times in row["rounds"] for value in times[1:]]
    sums = zip(*(_sums(times, len(row["ttft_ms"])) for times in row["rounds"]), strict=True)
    more = {"p90_ci95": of_quantile(later, 90)} if "p90" in row["later_ttft_ms"] else {}
    return row | {
        "n": len(row["rounds"]),
        "first_ttft_ci95_ms": of_quantile([times[0] for times in row["rounds"]]),
        "later_ttft_ms": {**row["later_ttft_ms"], "n": len(later), "median_ci95": of_quantile(later), **more},
        "ttft_ci95_ms": [of_quantile(some) for some in zip(*row["rounds"], strict=True)],
        "cumulative_ttft_ci95_ms": [of_quantile(some) for some in sums],
    }


def _sums(times: list[float], questions: int) -> list[float]:
    """Running sums; the questions that were not asked are taken to cost the median of the others."""
    return [*itertools.accumulate(times + [statistics.median(times)] * (questions - len(times)))]


def _projected(ours: Row, other: Row) -> int | None:
    later, other_later = (row["later_ttft_ms"]["median"] for row in (ours, other))
    return break_even(ours["first_ttft_ms"], later, other["first_ttft_ms"], other_later)


def _order(askers: Askers, suite: suites.Amortise, number: int) -> list[tuple[Arm, int]]:
    """The order of (arm, question): the arms take turns at every question, unless each turn would start a server, whose
    caches would be empty."""
    counts = range(suite.questions_per_video)
    if askers.run_together:
        order = [(arm, count) for count in counts for arm in askers.turn(number + count)]
    else:
        order = [(arm, count) for arm in askers.turn(number) for count in counts]
    return [(arm, count) for arm, count in order if count < _asked(arm, suite)]


def _asked(arm: Arm, suite: suites.Amortise) -> int:
    """How many of the questions are really asked: an arm that reads all frames takes the same time for each."""
    endless = arm.reads == "frames" and not arm.warmed
    return min(suite.frames_asked if endless else suite.questions_per_video, suite.questions_per_video)


def _row(arm: Arm, suite: suites.Amortise, rounds: list[list[float]]) -> Row:
    times = [statistics.median(some) for some in zip(*rounds, strict=True)]
    asked, questions = len(times), suite.questions_per_video
    later = [value for some in rounds for value in some[1:]] or times
    sums = zip(*(_sums(some, questions) for some in rounds), strict=True)
    return {
        "arm": arm.name,
        "frames": suite.frames,
        "resolution": suite.resolution,
        "asked": asked,
        "first_ttft_ms": round(times[0], 3),
        "later_ttft_ms": {
            "median": round(statistics.median(later), 3),
            **{name: round(value, 3) for name, value in percentiles(later, (90,)).items()},
        },
        "ttft_ms": [round(value, 3) for value in times + [statistics.median(times)] * (questions - asked)],
        "cumulative_ttft_ms": [round(statistics.median(some), 3) for some in sums],
        "rounds": [[round(value, 3) for value in some] for some in rounds],
    }
