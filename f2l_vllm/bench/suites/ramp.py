"""The highest rate of questions at which a server that runs already gives good answers.

Questions come at random times, whatever the server does. The rate is doubled, or halved, until good and bad are known;
then the gap between them is halved until it is small. An answer that fails is not good, and no rate is that the server
does not keep up with.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openai import APIError

from f2l_vllm.bench import intervals, metrics, trace
from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.arms import about_adapter, about_frames
from f2l_vllm.bench.client import Client
from f2l_vllm.bench.films import Films
from f2l_vllm.bench.results_file import ResultsFile, Row, Say
from f2l_vllm.bench.running import RunningServer
from f2l_vllm.client import Answer

_MOST_RATES = 24
_UPLOADS = 4
_KEPT_UP = 0.5  # of the rate, from the first question to the last answer


async def run(suite: suites.Ramp, server: RunningServer, folder: Path, results: ResultsFile, say: Say) -> None:
    """Ask at one rate after the other; a row for each. What was uploaded is deleted in the end.

    Raises:
        APIError, WrongAnswer: the server did not take the videos, or answers otherwise than asked.
    """
    films = Films(folder / "films")
    results.note(servers=server.facts)
    async with Client(server.url, suite.output_tokens, server.api_key, tidy=True) as client:
        paths = [
            await asyncio.to_thread(films.make, suite.frames, suite.resolution, suite.seed, number)
            for number in range(suite.videos)
        ]
        if suite.arm == "adapter":
            gate = asyncio.Semaphore(_UPLOADS)

            async def upload(path: Path) -> dict[str, Any]:
                async with gate:
                    return about_adapter((await client.upload(path)).id)

            about = [*await asyncio.gather(*map(upload, paths))]
        else:
            about = [about_frames(server.name, path) for path in paths]
        for one in about:  # before anything is timed
            await client.ask(suite.questions[0], **one)
        while (rate := next_rate(results.rows, suite.rate, suite.precision, suite.lowest)) is not None:
            results.add(await _at(rate, suite, client, about))
            say(_said(results.rows[-1]))


def derive(rows: list[Row]) -> dict[str, Any]:
    """`highest`: the row of the highest good rate below which no rate was bad; None if none was good."""
    bad = min((row["rate"] for row in rows if not row["is_good"]), default=math.inf)
    good = [row for row in rows if row["is_good"] and row["rate"] < bad]
    return {"highest": max(good, key=lambda row: row["rate"], default=None)}


def next_rate(rows: Sequence[Mapping[str, Any]], first: float, precision: float, lowest: float) -> float | None:
    """The rate to try next, questions a second; None: it is known well enough.

    Args:
        rows: what was tried: `rate`, `is_good`.
        precision: the largest relative gap that remains between good and bad.
        lowest: no rate below is tried.
    """
    if not rows:
        return first
    if len(rows) >= _MOST_RATES:
        return None
    bad = min((row["rate"] for row in rows if not row["is_good"]), default=None)
    good = max((row["rate"] for row in rows if row["is_good"] and (bad is None or row["rate"] < bad)), default=None)
    if bad is None:
        return None if good is None else float(2 * good)
    if good is None:
        return float(bad / 2) if bad / 2 >= lowest else None
    return None if bad / good <= 1 + precision else math.sqrt(good * bad)


async def _at(rate: float, suite: suites.Ramp, client: Client, about: Sequence[dict[str, Any]]) -> Row:
    popularity: trace.Popularity = "uniform"
    asked = trace.make(suite.requests, len(about), len(suite.questions), popularity, 1.0, rate, suite.seed)
    failures: list[str] = []

    async def ask(request: trace.Request, arrived: float | None) -> Answer | None:
        try:
            return await client.ask(suite.questions[request.question], started=arrived, **about[request.video])
        except APIError as error:
            failures.append(str(error.code or type(error).__name__))
            return None

    answers, seconds = await trace.replay(asked, ask, suite.requests)
    slo = suite.slo.model_dump(exclude_none=True)
    good = sum(metrics.is_good(answer, slo) for answer in answers)
    return row(rate, suite.requests, good, answers, seconds, failures, suite.share)


def row(
    rate: float, n: int, good: int, answers: Sequence[Answer], seconds: float, failures: Sequence[str], share: float
) -> Row:
    """Figures of one rate; `share_ci95` is Wilson's interval of the good answers' share."""
    found: Row = {
        "rate": round(rate, 4),
        "n": n,
        "good": good,
        "share": round(good / n, 4),
        "share_ci95": intervals.of_share(good, n),
        "is_good": good >= share * n and len(answers) / seconds >= _KEPT_UP * rate,
        "failures": {name: failures.count(name) for name in sorted(set(failures))},
    }
    return found | metrics.rounded(metrics.summary(answers, seconds)) if answers else found


def _said(row: Row) -> str:
    low, high = row["share_ci95"]
    return f"{row['rate']:g} questions/s: {row['share']:.1%} good ({low:.1%} to {high:.1%}, n = {row['n']})"
