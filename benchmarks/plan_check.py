"""`python -m benchmarks.plan_check`: hit rates behind HAProxy, and those that `f2l-vllm plan --replicas` predicts.

The servers have no model: they answer over HTTP after a fixed time, so many questions at a time, and remember as many
videos as they have places for adapters, those asked about last. HAProxy runs with `launch/haproxy.cfg`, for
`least-loaded` with `balance leastconn` in it. No proxy has `warm-first`: there the clients' process chooses the server.
Questions are drawn with seeds that the simulation does not use: it knows how often videos are asked about, not when.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from f2l_vllm.bench import record
from f2l_vllm.cluster.capacity import POLICIES
from f2l_vllm.cluster.policy import HAProxyHash, Policy, Recent
from f2l_vllm.cluster.simulation import Popularity, Scenario, Simulation

_CONFIG = Path(__file__).parents[1] / "launch" / "haproxy.cfg"
_BAR = 0.03
_OTHER_SEEDS = 100


class Server:
    """Answers as `scenario` says, and says whether the video was in memory."""

    def __init__(self, scenario: Scenario) -> None:
        self._memory, self._room = Recent(scenario.places), asyncio.Semaphore(scenario.concurrency)
        self._seconds = scenario.answer_s
        self.port = 0

    async def listen(self) -> asyncio.Server:
        """On a free port of this machine."""
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: (\d+)", head)
                body = b""
                if length is not None:
                    question = json.loads(await reader.readexactly(int(length[1])))
                    async with self._room:
                        answer = {"hit": self._memory.add(question["model"]), "port": self.port}
                        await asyncio.sleep(self._seconds)
                    body = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


class Way:
    """Asks the servers: through HAProxy, or each where `policy` says."""

    def __init__(self, urls: dict[str, str], client: httpx.AsyncClient, policy: Policy | None) -> None:
        self._urls, self._client, self._policy = urls, client, policy
        self._loads = dict.fromkeys(urls, 0)

    async def ask(self, video: str) -> dict[str, Any]:
        """The server's answer."""
        server = None if self._policy is None else self._policy.choose(video, self._loads)
        url = "http://haproxy" if server is None else self._urls[server]
        if server is not None:
            self._loads[server] += 1
        try:
            answer = await self._client.post(f"{url}/v1/chat/completions", json={"model": video})
        finally:
            if server is not None:
                self._loads[server] -= 1
        return answer.raise_for_status().json()


def find_haproxy() -> str | None:
    """The program, on the PATH or where Debian puts it."""
    return shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")


@contextmanager
def haproxy(
    ports: Sequence[int], bind: str | Path, folder: Path, balance: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """HAProxy in front of servers at `ports`, for as long as the block lasts; `folder` gets its `haproxy.log`.

    Args:
        bind: where it listens: an address with its port, or a socket.
        balance: instead of what questions have in its configuration.
    """
    program, config = find_haproxy(), folder / "haproxy.cfg"
    if program is None:
        raise SystemExit("HAProxy is needed: apt-get install haproxy")
    lines = "".join(f"    server s{number} 127.0.0.1:{port}\n" for number, port in enumerate(ports, 1))
    text = re.sub(r"(    server \w+ [\d.:]+\n)+", lines, _CONFIG.read_text())
    text = text.replace("bind 127.0.0.1:8080", f"bind {bind}")
    if balance is not None:
        text = re.sub(r"    balance hash.*\n(    hash-.*\n)+", f"    balance {balance}\n", text)
    config.write_text(text)
    with (folder / "haproxy.log").open("w") as log:
        process = subprocess.Popen([program, "-f", str(config)], stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def proxied(ports: list[int], balance: str | None, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `haproxy`."""
    socket, log = folder / "haproxy.sock", folder / "haproxy.log"
    with haproxy(ports, socket, folder, balance) as process:
        while not socket.exists():
            if process.poll() is not None:
                raise SystemExit(f"HAProxy ended: {log.read_text()}")
            await asyncio.sleep(0.05)
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(socket)), timeout=60) as client:
            yield client
        if " is DOWN" in log.read_text():
            raise SystemExit("this machine is too busy: HAProxy held a server for dead; try again when less is running")


async def measure(scenario: Scenario, policy: str, seed: int, questions: int) -> dict[str, Any]:
    """Ask `questions` questions and count hits, without the first quarter."""
    servers = [Server(scenario) for _ in scenario.names]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f2l-plan-")))
        for server in servers:
            await stack.enter_async_context(await server.listen())
        ports = [server.port for server in servers]
        chosen = POLICIES[policy](scenario)
        urls = {name: f"http://127.0.0.1:{port}" for name, port in zip(scenario.names, ports, strict=True)}
        if policy == "warm-first":
            way = Way(urls, await stack.enter_async_context(httpx.AsyncClient(timeout=60)), chosen)
        else:
            balance = "leastconn" if policy == "least-loaded" else None
            way = Way(urls, await stack.enter_async_context(proxied(ports, balance, folder)), None)
        result: dict[str, Any] = {}
        if isinstance(chosen, HAProxyHash):
            idle = dict.fromkeys(scenario.names, 0)
            homes = [scenario.names.index(chosen.choose(f"video-{n}", idle)) for n in range(scenario.videos)]
            found = [ports.index((await way.ask(f"video-{n}"))["port"]) for n in range(scenario.videos)]
            result["homes_as_predicted"] = sum(home == at for home, at in zip(homes, found, strict=True))
        left = Popularity(scenario.videos, scenario.zipf, np.random.default_rng(seed)).draw(questions)
        hits: list[bool] = []

        async def client() -> None:
            while left:
                hits.append((await way.ask(left.pop()))["hit"])

        await asyncio.gather(*(client() for _ in range(scenario.in_work)))
    return {"hit_rate": statistics.mean(hits[questions // 4 :]), **result}


def main() -> None:
    """Measure, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--videos", type=int, default=300)
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--zipf", type=float, default=0.9)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--answer-s", type=float, default=0.2)
    parser.add_argument("--questions", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scenario = Scenario(
        options.servers,
        options.videos,
        options.zipf,
        places=options.places,
        concurrency=options.concurrency,
        first_token_s=options.answer_s,
        answer_s=options.answer_s,
        load_s=0,
        fetch_s=0,
    )
    results = {}
    for policy in options.policies.split(","):
        seeds = range(_OTHER_SEEDS, _OTHER_SEEDS + options.seeds)
        measured = [asyncio.run(measure(scenario, policy, seed, options.questions)) for seed in seeds]
        simulated = [
            Simulation(scenario, POLICIES[policy](scenario), seed).run().hit_rate
            for seed in range(1, options.seeds + 1)
        ]
        off = statistics.mean(run["hit_rate"] for run in measured) - statistics.mean(simulated)
        results[policy] = {"measured": measured, "simulated_hit_rates": simulated, "off": round(off, 4)}
        print(policy, results[policy], flush=True)
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        version = subprocess.run([find_haproxy() or "haproxy", "-v"], capture_output=True, text=True).stdout
        configuration["haproxy"] = version.split()[2]
        record.write(options.json, configuration, results)
    worst = max(abs(result["off"]) for result in results.values())
    if worst > _BAR:
        raise SystemExit(f"the simulation is off by {worst}, more than {_BAR}")


if __name__ == "__main__":
    main()
