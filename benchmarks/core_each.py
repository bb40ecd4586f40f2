"""`python -m benchmarks.core_each`: answers a second of several servers with a core each, as a multiple of one's.

The servers are `f2l-vllm serve` of one PostgreSQL and one store, each bound to a core of its own, behind HAProxy with
`launch/haproxy.cfg`. Clients and proxy run on the cores of the servers that they ask: one server shares its core with
them, several share theirs. Rounds of one server, of all behind one proxy, and of each behind a proxy and with clients
of its own alternate. The last have nothing to do with each other, so they show what the machine's cores do at once. So
do products of matrices that fit a core's own cache, `arithmetic`: two threads of one physical core do hardly more of
them than one, however many cores the machine says it has.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from benchmarks.fleet import films
from benchmarks.haproxy import haproxy_version, proxied
from f2l_vllm import torch_shims
from f2l_vllm.bench import record
from f2l_vllm.bench.servers import gpu_share
from f2l_vllm.client import upload
from f2l_vllm.server_process import ServerProcess

torch_shims.install()

_BAR = 0.9  # of the servers' number
_WARM_SHARE = 4  # the first of so many parts of a round does not count


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """This process, and all that it starts, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _servers(options: argparse.Namespace, database: str, folder: Path) -> Iterator[list[ServerProcess]]:
    """One on each core; the first alone has a worker."""
    env = {"F2L_DATABASE_URL": database, "F2L_STORE": f"file://{folder / 'store'}"}
    env |= gpu_share(options.servers)
    servers = []
    try:
        for number in range(options.servers):
            home = folder / f"server-{number}" / "home"
            home.parent.mkdir()
            workers = ("--hypernetwork-workers", "0" if number else "1")
            with _on({number}):
                servers.append(ServerProcess(options.model, home, *workers, env=env))
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.end()


def _round_on(core: int, socket: Path, *given: Any) -> dict[str, Any]:
    """A round whose clients run on a core."""
    with _on({core}):
        return asyncio.run(_round(socket, *given))


@contextmanager
def _proxy(cores: Sequence[int], addresses: list[str], folder: Path) -> Iterator[Path]:
    folder = folder / "-".join(["proxy", *map(str, cores)]) / str(len(addresses))
    folder.mkdir(parents=True)
    with _on(set(cores)), proxied(addresses, folder) as socket:
        yield socket


async def _round(socket: Path, videos: list[str], clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Whole answers a second, and what became of the questions."""
    dice, counts, ends = random.Random(options.seed), Counter[str](), list[float]()
    started = time.monotonic()
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(socket)), timeout=60) as client:

        async def ask() -> None:
            while time.monotonic() < started + options.seconds:
                body = {
                    "model": dice.choice(videos),
                    "messages": [{"role": "user", "content": "Describe the video."}],
                    "max_completion_tokens": options.tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                answer = await client.post("http://haproxy/v1/chat/completions", json=body)
                counts[f"status {answer.status_code}"] += 1
                ends.append(time.monotonic() - started)

        await asyncio.gather(*(ask() for _ in range(clients)))
    begun = options.seconds / _WARM_SHARE
    settled = [end for end in ends if begun <= end < options.seconds]
    return {"answers_per_s": round(len(settled) / (options.seconds - begun), 2), **counts}


def _products(core: int, seconds: float) -> float:
    """Products a second of matrices that fit a core's own cache, on this core."""
    import torch

    torch.set_num_threads(1)
    one, count = torch.rand(128, 128), 0
    with _on({core}):
        started = time.monotonic()
        while (passed := time.monotonic() - started) < seconds:
            for _ in range(1000):
                torch.mm(one, one)
            count += 1000
    return count / passed


def _arithmetic(processes: ProcessPoolExecutor, cores: Sequence[int], seconds: float) -> dict[str, float]:
    one = processes.submit(_products, cores[0], seconds).result()
    asked = [processes.submit(_products, core, seconds) for core in cores]
    every = sum(found.result() for found in asked)
    return {"one_core": round(one), "all_cores": round(every), "times": round(every / one, 2)}


def _measure(options: argparse.Namespace, database: str, folder: Path) -> dict[str, Any]:
    with ProcessPoolExecutor(options.servers, get_context("spawn")) as processes:
        cores = range(options.servers)
        list(processes.map(_products, cores, [1.0] * len(cores)))  # each has begun
        arithmetic = [_arithmetic(processes, cores, options.seconds / 4) for _ in range(options.rounds)]
    print("arithmetic", arithmetic, flush=True)
    with _servers(options, database, folder) as servers:
        client = OpenAI(base_url=f"{servers[0].url}/v1", api_key="none")
        videos = [file.id for file in upload(client, *films(folder, options.videos, options.seed, fps=10))]
        addresses = [server.url.removeprefix("http://") for server in servers]
        rounds: dict[str, list[Any]] = {"one": [], "all": [], "apart": []}
        with ProcessPoolExecutor(len(servers), get_context("spawn")) as processes, ExitStack() as stack:
            together = stack.enter_context(_proxy(range(len(servers)), addresses, folder))
            alone = [stack.enter_context(_proxy([core], [one], folder)) for core, one in enumerate(addresses)]
            time.sleep(2)  # the proxies look every second
            for _ in range(options.rounds):
                for arm, count, socket in (("one", 1, alone[0]), ("all", len(servers), together)):
                    with _on(set(range(count))):
                        rounds[arm].append(asyncio.run(_round(socket, videos, options.clients * count, options)))
                    print(arm, rounds[arm][-1], flush=True)
                given = (videos, options.clients, options)
                asked = [processes.submit(_round_on, core, socket, *given) for core, socket in enumerate(alone)]
                each = [one.result() for one in asked]
                both = round(sum(one["answers_per_s"] for one in each), 2)
                rounds["apart"].append({"answers_per_s": both, "each": each})
                print("apart", rounds["apart"][-1], flush=True)
    medians = {arm: statistics.median(one["answers_per_s"] for one in rounds[arm]) for arm in rounds}
    times = {arm: round(medians[arm] / medians["one"], 2) for arm in ("all", "apart")}
    times["arithmetic"] = statistics.median(one["times"] for one in arithmetic)
    return {**rounds, "arithmetic": arithmetic, "median_answers_per_s": medians, "times": times}


def main() -> None:
    """Measure, print, and write the result."""
    from tests.support.postgres import needed_postgres

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--clients", type=int, default=8, help="for each server that is asked")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="f2l-core-each-") as name, needed_postgres() as postgres:
        results = _measure(options, postgres.new_database(), Path(name))
    print(results["median_answers_per_s"], f"times as many: {results['times']}", sep="\n")
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        configuration["haproxy"] = haproxy_version()
        record.write(options.json, configuration, results)
    if (times := results["times"]["all"]) < _BAR * options.servers:
        raise SystemExit(f"{options.servers} servers answer {times} times what one answers")


if __name__ == "__main__":
    main()
