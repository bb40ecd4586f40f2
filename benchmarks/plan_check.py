"""`python -m benchmarks.plan_check`: hit rates behind HAProxy, and those that `f2l-vllm plan --replicas` predicts.

The servers have no model: they answer over HTTP after a fixed time, so many questions at a time, and remember as many
videos as they have places for adapters, those asked about last. HAProxy runs with `launch/haproxy.cfg`, for
`least-loaded` with `balance leastconn` in it. No proxy has `warm-first`: there the clients' process chooses the server.
Questions are drawn with seeds that the simulation does not use: it knows how often videos are asked about, not when.

With `--model f2l-tiny` the servers are `f2l-vllm serve` of one PostgreSQL and one store, and count their own loads. The
videos are clips of the synthetic world. Answers take as long as they take: the hit rate does not depend on it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from openai import OpenAI

from benchmarks.fleet import films
from benchmarks.haproxy import haproxy_version, proxied
from f2l_vllm import torch_shims
from f2l_vllm.bench import record
from f2l_vllm.bench.servers import gpu_share
from f2l_vllm.client import metric, upload
from f2l_vllm.cluster.capacity import POLICIES
from f2l_vllm.cluster.policy import HAProxyHash, Policy, Recent
from f2l_vllm.cluster.simulation import Popularity, Scenario, Simulation
from f2l_vllm.server_process import ServerProcess

torch_shims.install()

_BAR = 0.03
_OTHER_SEEDS = 100


class Server:
    """Answers as `scenario` says, and says whether the video was in memory."""

    def __init__(self, scenario: Scenario) -> None:
        self._memory, self._room = Recent(scenario.places), asyncio.Semaphore(scenario.concurrency)
        self._seconds = scenario.answer_s
        self.port = self.loads = 0

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
                        self.loads += not self._memory.add(question["model"])
                        answer = {"port": self.port}
                        await asyncio.sleep(self._seconds)
                    body = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


class StandIns:
    """Servers without a model."""

    def __init__(self, scenario: Scenario) -> None:
        self._servers = [Server(scenario) for _ in scenario.names]

    async def __aenter__(self) -> StandIns:
        self._listening = [await server.listen() for server in self._servers]
        self.ports = [server.port for server in self._servers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._listening:
            server.close()

    def question(self, video: str) -> dict[str, Any]:
        """The body of one."""
        return {"model": video}

    def loads(self) -> int:
        """How often a video was not in memory."""
        return sum(server.loads for server in self._servers)


class RealServers:
    """`f2l-vllm serve`, with every video ready. The first alone has a worker."""

    def __init__(self, model: str, scenario: Scenario, folder: Path, database: str) -> None:
        given = {"F2L_DATABASE_URL": database, "F2L_STORE": f"file://{folder / 'store'}"}
        given |= gpu_share(scenario.servers)
        flags = {"max-cpu-loras": scenario.places, "max-loras": scenario.concurrency, "warm-adapters": 0}
        flags |= {"max-num-seqs": scenario.concurrency, "queue-limit": scenario.videos}
        common = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        self._servers = []
        for number in range(scenario.servers):
            home = folder / str(number) / "home"
            home.parent.mkdir()
            workers = ("--hypernetwork-workers", str(int(number == 0)))
            self._servers.append(ServerProcess(model, home, *common, *workers, env=given))
        self.ports = [int(server.url.rpartition(":")[2]) for server in self._servers]
        self._ids: dict[str, str] = {}

    def fill(self, paths: list[Path]) -> None:
        """Wait for the servers, and upload a video for each name."""
        for server in self._servers:
            server.wait_ready()
        client = OpenAI(base_url=f"{self._servers[0].url}/v1", api_key="none")
        self._ids = {f"video-{number}": file.id for number, file in enumerate(upload(client, *paths))}

    def question(self, video: str) -> dict[str, Any]:
        """The body of one."""
        message = {"role": "user", "content": "Describe the video."}
        return {"model": self._ids[video], "messages": [message], "max_tokens": 8, "temperature": 0}

    def loads(self) -> int:
        """How often an adapter was not in memory."""
        return round(sum(metric(server.url, "f2l_adapters_loaded_total") for server in self._servers))

    def end(self) -> None:
        """Stop them."""
        for server in self._servers:
            server.end()


class Way:
    """Asks the servers: through HAProxy, or each where `policy` says. `question` makes a body for a video."""

    def __init__(
        self,
        urls: dict[str, str],
        client: httpx.AsyncClient,
        policy: Policy | None,
        question: Callable[[str], dict[str, Any]],
    ) -> None:
        self._urls, self._client, self._policy, self._question = urls, client, policy, question
        self._loads = dict.fromkeys(urls, 0)

    async def ask(self, video: str) -> dict[str, Any]:
        """The server's answer."""
        server = None if self._policy is None else self._policy.choose(video, self._loads)
        url = "http://haproxy" if server is None else self._urls[server]
        if server is not None:
            self._loads[server] += 1
        try:
            answer = await self._client.post(f"{url}/v1/chat/completions", json=self._question(video))
        finally:
            if server is not None:
                self._loads[server] -= 1
        return answer.raise_for_status().json()


@asynccontextmanager
async def client_of(ports: list[int], balance: str | None, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of HAProxy in front of servers at `ports`; `balance`: instead of what questions have there."""
    with proxied([f"127.0.0.1:{port}" for port in ports], folder, balance) as socket:
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        async with httpx.AsyncClient(transport=transport, timeout=60) as client:
            yield client
        if " is DOWN" in (folder / "haproxy.log").read_text():
            raise SystemExit("this machine is too busy: HAProxy held a server for dead; try again when less is running")


async def measure(
    scenario: Scenario, policy: str, seed: int, questions: int, servers: StandIns | RealServers
) -> dict[str, Any]:
    """Ask `questions` questions; the hit rate of those after the first quarter."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f2l-plan-")))
        chosen, ports = POLICIES[policy](scenario), servers.ports
        urls = {name: f"http://127.0.0.1:{port}" for name, port in zip(scenario.names, ports, strict=True)}
        if policy == "warm-first":
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=60))
            way = Way(urls, client, chosen, servers.question)
        else:
            balance = "leastconn" if policy == "least-loaded" else None
            client = await stack.enter_async_context(client_of(ports, balance, folder))
            way = Way(urls, client, None, servers.question)
        result: dict[str, Any] = {}
        if isinstance(chosen, HAProxyHash) and isinstance(servers, StandIns):  # the others do not say who they are
            idle = dict.fromkeys(scenario.names, 0)
            homes = [scenario.names.index(chosen.choose(f"video-{n}", idle)) for n in range(scenario.videos)]
            found = [ports.index((await way.ask(f"video-{n}"))["port"]) for n in range(scenario.videos)]
            result["homes_as_predicted"] = sum(home == at for home, at in zip(homes, found, strict=True))
        drawn = Popularity(scenario.videos, scenario.zipf, np.random.default_rng(seed)).draw(questions)

        async def ask(left: list[str]) -> int:
            """All these. Returns how many had their video loaded."""
            before = servers.loads()

            async def client() -> None:
                while left:
                    await way.ask(left.pop())

            await asyncio.gather(*(client() for _ in range(scenario.in_work)))
            return servers.loads() - before

        settled = questions // 4
        await ask(drawn[:settled])
        loads = await ask(drawn[settled:])
    return {"hit_rate": 1 - loads / (questions - settled), **result}


async def _measure(scenario: Scenario, policy: str, seed: int, questions: int) -> dict[str, Any]:
    async with StandIns(scenario) as servers:
        return await measure(scenario, policy, seed, questions, servers)


@contextmanager
def real_servers(model: str, scenario: Scenario) -> Iterator[RealServers]:
    """Servers that are ready to answer about all videos."""
    from tests.support.postgres import needed_postgres

    with tempfile.TemporaryDirectory(prefix="f2l-plan-") as name, needed_postgres() as postgres:
        folder = Path(name)
        servers = RealServers(model, scenario, folder, postgres.new_database())
        try:
            servers.fill(films(folder, scenario.videos, 1, fps=10))
            yield servers
        finally:
            servers.end()


def _compare(scenario: Scenario, options: argparse.Namespace, servers: RealServers | None) -> dict[str, Any]:
    """Hit rates under each policy, measured and simulated."""
    results = {}
    for policy in options.policies.split(","):
        seeds = range(_OTHER_SEEDS, _OTHER_SEEDS + options.seeds)
        if servers is None:
            measured = [asyncio.run(_measure(scenario, policy, seed, options.questions)) for seed in seeds]
        else:
            measured = [asyncio.run(measure(scenario, policy, seed, options.questions, servers)) for seed in seeds]
        simulated = [
            Simulation(scenario, POLICIES[policy](scenario), seed).run().hit_rate
            for seed in range(1, options.seeds + 1)
        ]
        off = statistics.mean(run["hit_rate"] for run in measured) - statistics.mean(simulated)
        results[policy] = {"measured": measured, "simulated_hit_rates": simulated, "off": round(off, 4)}
        print(policy, results[policy], flush=True)
    return results


def main() -> None:
    """Measure, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="of real servers, such as f2l-tiny; by default they have none")
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
    with nullcontext() if options.model is None else real_servers(options.model, scenario) as servers:
        results = _compare(scenario, options, servers)
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        configuration["haproxy"] = haproxy_version()
        record.write(options.json, configuration, results)
    worst = max(abs(result["off"]) for result in results.values())
    if worst > _BAR:
        raise SystemExit(f"the simulation is off by {worst}, more than {_BAR}")


if __name__ == "__main__":
    main()
