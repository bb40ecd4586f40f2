"""From a suite to its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.results_file import ResultsFile, Say
from f2l_vllm.bench.running import RunningServer
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.bench.suites import amortise, capacity, latency, ramp, tax, throughput

SUITES: dict[str, Any] = {  # the module that measures each
    "amortise": amortise,
    "capacity": capacity,
    "latency": latency,
    "ramp": ramp,
    "tax": tax,
    "throughput": throughput,
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

    module = SUITES[suite.suite]
    into = ResultsFile(json_to, suite.suite, configuration, module.derive, resume)
    await module.run(suite, subject, folder, into, say)
    return into.content


def measured(path: Path) -> dict[str, Any]:
    """A result that was written before, with what follows from its rows.

    Raises:
        ValueError: it is no result of a suite.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["suite"] == "amortise" and result["configuration"]["rounds"] == 1:  # its medians are the answers
            for row in result["rows"]:
                row.setdefault("rounds", [row["ttft_ms"][: row["asked"]]])
        return result | SUITES[result["suite"]].derive(result["rows"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of 'f2l-vllm bench': {error!r}") from error
