"""The first token of one question about one video, over frames and resolution."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path
from typing import Any

from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.arms import ARMS, Arm
from f2l_vllm.bench.askers import Askers
from f2l_vllm.bench.costs import Costs
from f2l_vllm.bench.intervals import of_quantile, of_ratio
from f2l_vllm.bench.results_file import ResultsFile, Row, Say
from f2l_vllm.bench.running import RunningServer
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.client import Answer
from f2l_vllm.evaluation.percentiles import percentiles

_SEQUENCES = 2


async def run(
    suite: suites.Latency, subject: Subject | RunningServer, folder: Path, results: ResultsFile, say: Say
) -> None:
    """Measure every cell; in each round of a cell the arms take turns, each with the same question.

    Cells above `suite.count_above` frames are counted: `ttft_ms` is None and `counted` true.

    Raises:
        ServerFailed, APIError, WrongAnswer: a server did not start, or did not answer as asked.
        ValueError: the prompts are too long for the model.
    """
    todo = [
        (frames, edge)
        for frames in suite.frames
        for edge in suite.resolution
        if not results.has(frames=frames, resolution=edge)
    ]
    measured = [(frames, edge) for frames, edge in todo if frames <= suite.count_above]
    if measured:
        longest = max(frames for frames in suite.frames if frames <= suite.count_above)
        videos = 2 * len(suite.resolution) * len(suite.frames)
        async with Askers(suite, subject, folder, frames=longest, sequences=_SEQUENCES, videos=videos) as askers:
            results.note(servers=askers.described())
            await askers.prepare()
            for frames, edge in measured:
                results.add(*await _cell(suite, askers, frames, edge, say))
    if len(measured) < len(todo) and isinstance(subject, Subject):
        costs = Costs(subject)
        for frames, edge in todo:
            if frames > suite.count_above:
                results.add(*(_counted(ARMS[name], suite, costs, frames, edge) for name in suite.arms))


def derive(rows: list[Row]) -> dict[str, Any]:
    """`rows` with the number of their values and the intervals; `ratios`: every arm over the arm `adapter` in each
    cell, paired by rounds; `geometric_means` of the ratios over cells."""
    rows = [row | {"ttft_ms": _with_intervals(row["ttft_ms"])} for row in rows]
    ratios = []
    for adapter in (row for row in rows if row["arm"] == "adapter"):
        for row in rows:
            if row["arm"] == "adapter" or any(row[name] != adapter[name] for name in ("frames", "resolution")):
                continue
            timed = row["ttft_ms"] is not None and adapter["ttft_ms"] is not None
            ratios.append(
                {
                    "arm": row["arm"],
                    "over": "adapter",
                    "frames": row["frames"],
                    "resolution": row["resolution"],
                    "ttft": _ratio(row["ttft_ms"]["median"], adapter["ttft_ms"]["median"]) if timed else None,
                    "ttft_ci95": of_ratio(row["ttft_ms"]["all"], adapter["ttft_ms"]["all"]) if timed else None,
                    **{name: _ratio(row[name], adapter[name]) for name in ("prompt_tokens", "state_bytes")},
                }
            )
    arms = dict.fromkeys(ratio["arm"] for ratio in ratios)
    return {"rows": rows, "ratios": ratios, "geometric_means": {arm: _means(arm, ratios) for arm in arms}}


def _with_intervals(times: dict[str, Any] | None) -> dict[str, Any] | None:
    if times is None:
        return None
    figures = {
        f"{name}_ci95": of_quantile(times["all"], p) for name, p in (("median", 50), ("p90", 90)) if name in times
    }
    return {**times, "n": len(times["all"]), **figures}


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else round(value / other, 2)


async def _cell(suite: suites.Latency, askers: Askers, frames: int, edge: int, say: Say) -> list[Row]:
    """All arms at one number of frames and resolution."""
    arms = [ARMS[name] for name in suite.arms]
    answers: dict[str, list[Answer]] = {arm.name: [] for arm in arms}
    known = await asyncio.to_thread(askers.films.make, frames, edge, suite.seed)
    for number in range(suite.rounds):
        question = suite.questions[number % len(suite.questions)]
        other = suite.questions[(number + 1) % len(suite.questions)]
        for arm in askers.turn(number):
            if arm.reads != "frames" and not arm.cold:
                if arm.reads == "adapter":
                    await askers.upload(arm, [known])
                answer = await askers.ask(arm, known, question)
            else:
                video = await asyncio.to_thread(askers.fresh, frames, edge)
                if arm.cold:
                    answer = await askers.ask_cold(arm, video, question, keep=False)
                else:
                    if arm.warmed:
                        await askers.ask(arm, video, other)
                    answer = await askers.ask(arm, video, question)
                video.unlink()
            answers[arm.name].append(answer)
            say(f"{frames} frames, {edge} px, {arm.name}: first token after {answer.ttft * 1e3:.1f} ms")
    return [_row(arm, askers, frames, edge, answers[arm.name]) for arm in arms]


def _row(arm: Arm, askers: Askers, frames: int, edge: int, answers: list[Answer]) -> Row:
    times = [answer.ttft * 1e3 for answer in answers]
    timed = {
        "median": round(statistics.median(times), 3),
        **{name: round(value, 3) for name, value in percentiles(times, (90,)).items()},
        "all": [round(value, 3) for value in times],
    }
    tokens = statistics.median_low(answer.prompt_tokens for answer in answers)
    visual = answers[0].details["visual_tokens"] if arm.reads == "frames" else 0
    state = _state(arm, visual, askers.kv_bytes_per_token, askers.adapter_bytes)
    return _cost(arm, frames, edge, tokens, visual, state) | {"ttft_ms": timed}


def _counted(arm: Arm, suite: suites.Latency, costs: Costs, frames: int, edge: int) -> Row:
    """The row of a cell that is not run."""
    asked = [suite.questions[number % len(suite.questions)] for number in range(suite.rounds)]
    in_prompt = frames if arm.reads == "frames" else 0
    whole = statistics.median_low(costs.prompt_tokens(question, in_prompt) for question in asked)
    visual = costs.visual_tokens(in_prompt, suite.merge_rate if arm.merges else 0.0)
    tokens = whole - (costs.visual_tokens(in_prompt) - visual)
    state = _state(arm, visual, costs.kv_bytes_per_token, costs.adapter_bytes)
    return _cost(arm, frames, edge, tokens, visual, state) | {"counted": True}


def _state(arm: Arm, visual: int, kv_bytes_per_token: int | None, adapter_bytes: int | None) -> int | None:
    """Bytes that keep the video answerable; None if the server does not say."""
    if arm.reads == "frames":
        return visual * kv_bytes_per_token if kv_bytes_per_token else None
    return adapter_bytes if arm.reads == "adapter" else 0


def _cost(arm: Arm, frames: int, edge: int, tokens: int, visual: int, state: int | None) -> Row:
    return {
        "arm": arm.name,
        "frames": frames,
        "resolution": edge,
        "ttft_ms": None,
        "prompt_tokens": tokens,
        "visual_tokens": visual,
        "state_bytes": state,
        "counted": False,
    }


def _means(arm: str, ratios: list[dict[str, Any]]) -> dict[str, float]:
    means = {}
    for name in ("ttft", "prompt_tokens", "state_bytes"):
        values = [ratio[name] for ratio in ratios if ratio["arm"] == arm and ratio[name]]
        if values:
            means[name] = round(statistics.geometric_mean(values), 2)
    return means
