"""From a suite to its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.results_file import ResultsFile, Say
from f2l_vllm.bench.running import RunningServer
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.bench.suites import amortise, capacity, latency, ramp, tax, throughput

SUITES: dict[type, Any] = {  # the module that measures each
    suites.Amortise: amortise,
    suites.Capacity: capacity,
    suites.Latency: latency,
    suites.Ramp: ramp,
    suites.Tax: tax,
    suites.Throughput: throughput,
}


async def measure(
    suite: suites.Suite, subject: Subject | RunningServer, folder: Path, json_to: Path, resume: bool, say: Say
) -> dict[str, Any]:
    """Measure what is not measured yet, and return the result as it was written.

    Args:
        subject: a model, for which servers are started, or a server that runs already; then the machine in the result
            is the one that asks.
        folder: for videos, adapters, servers' data and logs.
        say: told of every measurement as it is made.

    Raises:
        ValueError: the suite cannot be measured with this model, or the file to resume holds another result.
        ServerFailed, APIError, WrongAnswer, TrafficFailed: a server did not start, or did not answer as asked.
    """
    configuration = {**suite.model_dump(mode="json"), "model": subject.name, "dtype": subject.dtype}

    module = SUITES[type(suite)]
    into = ResultsFile(json_to, suite.suite, configuration, module.derive, resume)
    await module.run(suite, subject, folder, into, say)
    return into.content
