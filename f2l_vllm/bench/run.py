"""From a suite to its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.results_file import ResultsFile
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.bench.suites import amortise, capacity, latency, tax, throughput

Say = Callable[[str], None]


async def measure(
    suite: suites.Suite, subject: Subject, folder: Path, json_to: Path, resume: bool, say: Say
) -> dict[str, Any]:
    """Measure what is not measured yet, and return the result as it was written.

    Args:
        folder: for videos, adapters, servers' data and logs.
        say: told of every measurement as it is made.

    Raises:
        ValueError: the suite cannot be measured of this model, or there is another result to resume.
        ServerFailed, APIError, WrongAnswer, TrafficFailed: a server did not start, or not answer as asked.
    """
    configuration = {**suite.model_dump(mode="json"), "model": subject.name, "dtype": subject.dtype}

    def results(derive: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> ResultsFile:
        return ResultsFile(json_to, suite.suite, configuration, derive, resume)

    match suite:
        case suites.Tax():
            into = results(tax.derive)
            await tax.run(suite, subject, folder, into, say)
        case suites.Throughput():
            into = results(throughput.derive)
            await throughput.run(suite, subject, folder, into, say)
        case suites.Latency():
            into = results(latency.derive)
            await latency.run(suite, subject, folder, into, say)
        case suites.Amortise():
            into = results(amortise.derive)
            await amortise.run(suite, subject, folder, into, say)
        case suites.Capacity():
            into = results(capacity.derive)
            capacity.run(suite, subject, into)
    return into.content
