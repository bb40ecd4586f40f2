"""The first token of one question about one video, over frames and resolution."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path
from typing import Any

from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.arms import ARMS, Arm
from f2l_vllm.bench.askers import Askers
from f2l_vllm.bench.client import Answer
from f2l_vllm.bench.costs import Costs
from f2l_vllm.bench.results_file import ResultsFile, Row, Say
from f2l_vllm.bench.servers import Room
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.evaluation.percentiles import percentiles

_SEQUENCES = 2


async def run(suite: suites.Latency, subject: Subject, folder: Path, results: ResultsFile, say: Say) -> None:
    """Measure every cell; in each round of a cell the arms take turns, each with the same question.

    Cells above `suite.count_above` frames are counted: `ttft_ms` is None and `counted` true.

    Raises:
        ServerFailed, APIError, WrongAnswer: a server did not start, or did not answer as asked.
        ValueError: the prompts are too long for the model.
    """
    costs = Costs(subject)
    todo = [
        (frames, edge)
        for frames in suite.frames
        for edge in suite.resolution
        if not results.has(frames=frames, resolution=edge)
    ]
    measured = [(frames, edge) for frames, edge in todo if frames <= suite.count_above]
    if measured:
        longest = max(frames for frames in suite.frames if frames <= suite.count_above)
        tokens = costs.longest_prompt(suite.questions, longest) + suite.output_tokens
        if tokens > costs.longest:
            raise ValueError(
                f"{longest} frames make a prompt of {tokens} tokens and {subject.name} reads {costs.longest}: lower "
                "count_above, and longer videos are counted"
            )
        videos = 2 * len(suite.resolution) * len(suite.frames)
        room = Room(tokens, _SEQUENCES, longest, videos, suite.kv_gib)
        async with Askers(suite, subject, costs, folder, room) as askers:
            results.note(servers=askers.described())
            await askers.prepare()
            for frames, edge in measured:
                results.add(*await _cell(suite, costs, askers, frames, edge, say))
    for frames, edge in todo:
        if frames > suite.count_above:
            results.add(*(_counted(ARMS[name], suite, costs, frames, edge) for name in suite.arms))


def derive(rows: list[Row]) -> dict[str, Any]:
    """`ratios`: every arm over the arm `adapter` in each cell; `geometric_means` of the ratios over cells."""
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
                    "ttft": round(row["ttft_ms"]["median"] / adapter["ttft_ms"]["median"], 2) if timed else None,
                    **{name: round(row[name] / adapter[name], 2) for name in ("prompt_tokens", "state_bytes")},
                }
            )
    arms = dict.fromkeys(ratio["arm"] for ratio in ratios)
    return {"ratios": ratios, "geometric_means": {arm: _means(arm, ratios) for arm in arms}}


async def _cell(suite: suites.Latency, costs: Costs, askers: Askers, frames: int, edge: int, say: Say) -> list[Row]:
    """All arms at one number of frames and resolution."""
    arms = [ARMS[name] for name in suite.arms]
    answers: dict[str, list[Answer]] = {arm.name: [] for arm in arms}
    known = await asyncio.to_thread(askers.films.make, frames, edge, suite.seed)
    for number in range(suite.rounds):
        question = suite.questions[number % len(suite.questions)]
        other = suite.questions[(number + 1) % len(suite.questions)]
        for arm in askers.turn(number):
            if arm.reads == "adapter" and not arm.cold:
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
    return [_row(arm, suite, costs, askers, frames, edge, answers[arm.name]) for arm in arms]


def _row(
    arm: Arm, suite: suites.Latency, costs: Costs, askers: Askers, frames: int, edge: int, answers: list[Answer]
) -> Row:
    times = [answer.ttft * 1e3 for answer in answers]
    timed = {
        "median": round(statistics.median(times), 3),
        **{name: round(value, 3) for name, value in percentiles(times, (90,)).items()},
        "all": [round(value, 3) for value in times],
    }
    tokens = statistics.median_low(answer.prompt_tokens for answer in answers)
    visual = answers[0].details["visual_tokens"] if arm.reads == "frames" else 0
    return _cost(arm, costs, frames, edge, tokens, visual, askers.adapter_bytes) | {"ttft_ms": timed}


def _counted(arm: Arm, suite: suites.Latency, costs: Costs, frames: int, edge: int) -> Row:
    """The row of a cell that is not run."""
    asked = [suite.questions[number % len(suite.questions)] for number in range(suite.rounds)]
    in_prompt = frames if arm.reads == "frames" else 0
    whole = statistics.median_low(costs.prompt_tokens(question, in_prompt) for question in asked)
    visual = costs.visual_tokens(in_prompt, suite.merge_rate if arm.merges else 0.0)
    tokens = whole - (costs.visual_tokens(in_prompt) - visual)
    return _cost(arm, costs, frames, edge, tokens, visual, None) | {"counted": True}


def _cost(arm: Arm, costs: Costs, frames: int, edge: int, tokens: int, visual: int, adapter_bytes: int | None) -> Row:
    return {
        "arm": arm.name,
        "frames": frames,
        "resolution": edge,
        "ttft_ms": None,
        "prompt_tokens": tokens,
        "visual_tokens": visual,
        "state_bytes": visual * costs.kv_bytes_per_token if visual else adapter_bytes or costs.adapter_bytes,
        "counted": False,
    }


def _means(arm: str, ratios: list[dict[str, Any]]) -> dict[str, float]:
    means = {}
    for name in ("ttft", "prompt_tokens", "state_bytes"):
        values = [ratio[name] for ratio in ratios if ratio["arm"] == arm and ratio[name] is not None]
        if values:
            means[name] = round(statistics.geometric_mean(values), 2)
    return means
