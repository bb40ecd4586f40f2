"""`python -m benchmarks.popularity`: what it costs that a question's adapter is not in the engine yet.

One server, many more videos than it has places for adapters. Arms, alternating: `resident` asks about a few videos
whose adapters fit into the engine's slots; `uniform` about all, each as likely, so that nearly every adapter comes from
disk; `zipf` about all, the n-th as likely as 1/n. The same question each time, streamed, the same number at once.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from benchmarks.fleet import fleet
from f2l_vllm.bench import record
from f2l_vllm.client import ask_async, processed
from f2l_vllm.evaluation.percentiles import percentiles
from f2l_vllm.server_process import ServerProcess

ARMS = ("resident", "uniform", "zipf")
_QUESTION = "What is the background?"


async def arm(client: AsyncOpenAI, choices: list[str], concurrency: int) -> dict[str, Any]:
    """Ask all of `choices`, `concurrency` at a time."""
    left = list(reversed(choices))
    first_ms: list[float] = []

    async def asker() -> None:
        while left:
            first_ms.append((await ask_async(client, left.pop(), _QUESTION, 8)).ttft * 1e3)

    started = time.perf_counter()
    await asyncio.gather(*(asker() for _ in range(concurrency)))
    return {"per_second": len(choices) / (time.perf_counter() - started), "first_ms": first_ms}


async def measure(server: ServerProcess, paths: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Upload, then the arms in turn."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        gate = asyncio.Semaphore(4)

        async def upload(path: Path) -> str:
            async with gate:
                file = await client.files.create(file=path, purpose="vision")
                return (await processed(client, file)).id

        ids = list(await asyncio.gather(*map(upload, paths)))
        rng = random.Random(options.seed)
        weights = [1 / (place + 1) for place in range(len(ids))]
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
        for number in range(options.rounds):
            for name in ARMS[number % 3 :] + ARMS[: number % 3]:
                chosen = {
                    "resident": lambda: rng.choices(ids[: options.resident], k=options.questions),
                    "uniform": lambda: rng.choices(ids, k=options.questions),
                    "zipf": lambda: rng.choices(ids, weights, k=options.questions),
                }[name]()
                if name == "resident":
                    await arm(client, ids[: options.resident], options.concurrency)  # they are there when it begins
                rounds[name].append(await arm(client, chosen, options.concurrency))
    return {name: summary(some) for name, some in rounds.items()}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; the first token's percentiles over all questions."""
    first = [value for one in rounds for value in one["first_ms"]]
    per_second = [round(one["per_second"], 1) for one in rounds]
    return {
        "questions_per_second": {"median": statistics.median(per_second), "all": per_second},
        "first_token_ms": {name: round(value, 1) for name, value in percentiles(first, (50, 90, 99)).items()},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--videos", type=int, default=1024)
    parser.add_argument("--resident", type=int, default=16, help="videos of the arm whose adapters stay in the engine")
    parser.add_argument("--questions", type=int, default=1000, help="per arm and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--slots", type=int, default=32, help="--max-loras of the engine")
    parser.add_argument("--host-slots", type=int, default=32, help="--max-cpu-loras of the engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    flags = ("--max-loras", str(options.slots), "--max-cpu-loras", str(options.host_slots))
    with fleet(options.model, *flags, videos=options.videos, seed=options.seed, fps=4) as (server, paths):
        results = asyncio.run(measure(server, paths, options))
    resident = results["resident"]
    for name in ("uniform", "zipf"):
        of = results[name]
        of["throughput_over_resident"] = round(
            of["questions_per_second"]["median"] / resident["questions_per_second"]["median"], 3
        )
        if "p99" in of["first_token_ms"]:
            of["first_token_p99_added_ms"] = round(of["first_token_ms"]["p99"] - resident["first_token_ms"]["p99"], 1)
    names = ("model", "videos", "resident", "questions", "rounds", "concurrency", "slots", "host_slots", "seed")
    record.write(options.json, {name: getattr(options, name) for name in names}, results)


if __name__ == "__main__":
    main()
