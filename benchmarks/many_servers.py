"""`python -m benchmarks.many_servers`: servers of one catalog and one store behind HAProxy, each of them killed once.

PostgreSQL, the store (a folder) and HAProxy with `launch/haproxy.cfg` run on this machine. Clients ask about videos at
random, each of which has to answer as it did alone, while videos are deleted, expire, and are uploaded again; from the
moment a file is gone, every server has to say that it is not there. Beside them batches of questions run, each of which
has to be answered once. One server after the other is killed, and started again. In the end every video is deleted with
`wait=erased`, and what is left anywhere is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI, NotFoundError
from sqlalchemy import update

from benchmarks.fleet import films
from benchmarks.haproxy import haproxy
from f2l_vllm import torch_shims
from f2l_vllm.bench import record
from f2l_vllm.bench.servers import gpu_share
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import files
from f2l_vllm.client import metric
from f2l_vllm.server_process import ServerProcess

torch_shims.install()

_QUESTION: Any = [{"role": "user", "content": "Describe the video."}]
T = TypeVar("T")
_ENDED = ("completed", "failed", "expired", "cancelled")
_PORTS, _ADDRESS = (8001, 8002, 8003), "127.0.0.1:8080"


class Cluster:
    """Some servers of one catalog and one store; the first alone has workers."""

    def __init__(self, folder: Path, database: str, count: int) -> None:
        self._folder = folder
        own = {"F2L_DATABASE_URL": database, "F2L_STORE": f"file://{folder / 'store'}"}
        self._env = own | gpu_share(count)
        self._catalog = Catalog(database)
        self.servers = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> ServerProcess:
        home = self._folder / f"server-{number}" / "home"
        home.parent.mkdir(exist_ok=True)
        workers = ("--hypernetwork-workers", "1" if number == 0 else "0")
        return ServerProcess("f2l-tiny", home, *workers, port=_PORTS[number], env=self._env)

    def kill(self, number: int) -> None:
        """At once."""
        self.servers[number].process.send_signal(signal.SIGKILL)
        self.servers[number].process.wait()

    def restart(self, number: int) -> None:
        """Serve the same data folder again."""
        self.servers[number] = self._start(number)
        self.servers[number].wait_ready()

    def expire(self, file_id: str) -> None:
        """Let the file's time have come."""
        with self._catalog._write() as connection:
            connection.execute(update(files).where(files.c.id == file_id).values(expires_at=time.time() - 1))

    def left(self) -> dict[str, int]:
        """Files of adapters and videos anywhere, and adapters in engines."""
        found = {"store": _files(self._folder / "store")}
        for number, server in enumerate(self.servers):
            memory = f"f2l-{os.getuid()}-{hashlib.sha256(str(server.home).encode()).hexdigest()[:12]}"
            found[f"disk of {number}"] = _files(server.home / "adapters") + _files(server.home / "videos")
            found[f"memory of {number}"] = _files(Path("/dev/shm") / memory)
            found[f"engine of {number}"] = int(metric(server.url, "f2l_adapters_resident"))
        return found


class Run:
    """What the clients met."""

    def __init__(self, url: str, cluster: Cluster, paths: list[Path], seed: int) -> None:
        self._proxy = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._cluster, self._paths, self._rng = cluster, paths, random.Random(seed)
        self.ids: dict[Path, str] = {}
        self._answers: dict[Path, str] = {}
        self.counts: Counter[str] = Counter()
        self.erased_seconds: list[float] = []

    async def upload(self, path: Path) -> None:
        """Upload and wait until it is ready."""
        file = await self._heard(lambda: self._proxy.files.create(file=path, purpose="vision"))
        while (file := await self._heard(partial(self._proxy.files.retrieve, file.id))).status == "uploaded":
            await asyncio.sleep(0.05)
        assert file.status == "processed", file
        self.ids[path] = file.id

    async def _heard(self, call: Callable[[], Awaitable[T]]) -> T:
        """Again, as long as the server is killed that should answer."""
        while True:
            try:
                return await call()
            except APIConnectionError:
                self.counts["asked again"] += 1
                await asyncio.sleep(0.5)

    async def ask(self, file_id: str, url: str | None = None) -> str:
        """By the proxy, or at one server."""
        client = self._proxy if url is None else self._proxy.with_options(base_url=f"{url}/v1")
        answer = await client.chat.completions.create(
            model=file_id, messages=_QUESTION, temperature=0, max_completion_tokens=32
        )
        return answer.choices[0].message.content or ""

    async def begin(self) -> None:
        """Every video once, alone, at the first server; and at the others, which have to say the same."""
        for path in self._paths:
            await self.upload(path)
            self._answers[path] = await self.ask(self.ids[path], self._cluster.servers[0].url)
            for server in self._cluster.servers[1:]:
                same = await self.ask(self.ids[path], server.url) == self._answers[path]
                self.counts["the same elsewhere" if same else "another answer elsewhere"] += 1

    async def question(self) -> None:
        """One, at random."""
        path = self._rng.choice(self._paths)
        file_id = self.ids.get(path)
        if file_id is None:
            return
        try:
            right = await self.ask(file_id) == self._answers[path]
            self.counts["right" if right else "wrong"] += 1
        except APIStatusError as error:
            gone = error.code == "video_not_found" and self.ids.get(path) != file_id
            self.counts["gone meanwhile" if gone else f"error {error.status_code} {error.code}"] += 1
        except APIError as error:
            self.counts[f"error {type(error).__name__} {error.__cause__!r}"] += 1

    async def change(self) -> None:
        """Delete one or let it expire, ask every server that lives for it, and upload it again; or upload it once more
        beside itself, and delete the first of both."""
        path = self._rng.choice(self._paths)
        file_id = self.ids.pop(path, None)
        if file_id is None:
            return
        kind = self._rng.choice(("deleted", "expired", "uploaded beside itself"))
        self.counts[kind] += 1
        if kind == "uploaded beside itself":
            await self.upload(path)
        if kind == "expired":
            self._cluster.expire(file_id)
        else:
            await self._delete(file_id)
        await self._ask_everywhere(file_id)
        if path not in self.ids:
            await self.upload(path)

    async def _delete(self, file_id: str) -> None:
        with suppress(NotFoundError):  # the server that did it was killed before it said so
            await self._heard(partial(self._proxy.files.delete, file_id))

    async def _ask_everywhere(self, file_id: str) -> None:
        """A file that has gone."""
        for server in self._cluster.servers:
            if server.process.poll() is None:
                try:
                    await self.ask(file_id, server.url)
                    self.counts["answered after it was gone"] += 1
                except APIStatusError as error:
                    self.counts["gone everywhere" if error.status_code == 404 else f"error {error.code}"] += 1
                except APIError:
                    self.counts["not there yet"] += 1  # it starts

    async def batch(self, size: int) -> None:
        """Questions at random in one file, and the answers in another."""
        asked = {str(number): self._rng.choice(list(self.ids.items())) for number in range(size)}
        lines = [_line(number, file_id) for number, (_, file_id) in asked.items()]
        content = ("questions.jsonl", "\n".join(lines).encode())
        given = await self._heard(lambda: self._proxy.files.create(file=content, purpose="batch"))
        create = partial(self._proxy.batches.create, endpoint="/v1/chat/completions", completion_window="24h")
        batch = await self._heard(partial(create, input_file_id=given.id))
        while batch.status not in _ENDED:
            await asyncio.sleep(0.2)
            batch = await self._heard(partial(self._proxy.batches.retrieve, batch.id))
        self.counts[f"batches {batch.status}"] += 1
        answers = Counter[str]()
        for written in filter(None, (batch.output_file_id, batch.error_file_id)):
            for line in (await self._heard(partial(self._proxy.files.content, written))).text.splitlines():
                one = json.loads(line)
                answers[one["custom_id"]] += 1
                self.counts[f"batched {self._judged(*asked[one['custom_id']], one['response'])}"] += 1
        self.counts["batched answers missing"] += size - len(answers)
        self.counts["batched answers doubled"] += answers.total() - len(answers)

    def _judged(self, path: Path, file_id: str, response: dict[str, Any]) -> str:
        body = response["body"]
        if response["status_code"] == 200:
            return "right" if body["choices"][0]["message"]["content"] == self._answers[path] else "wrong"
        code = body["error"]["code"]
        gone = code == "video_not_found" and self.ids.get(path) != file_id
        return "gone meanwhile" if gone else f"error {response['status_code']} {code}"

    async def end(self) -> None:
        """Delete everything, and count what nobody knows of: uploads whose answer was lost with a server."""
        for path in self._paths:
            started = time.perf_counter()
            url = f"{self._cluster.servers[0].url}/v1/files/{self.ids.pop(path)}"
            async with httpx.AsyncClient(timeout=120) as client:
                answer = (await client.delete(url, params={"wait": "erased"})).json()
            self.counts["erased" if answer["f2l"]["erased"] else "not erased"] += 1
            self.erased_seconds.append(time.perf_counter() - started)
        async for batch in self._proxy.batches.list():
            while (await self._proxy.batches.retrieve(batch.id)).status not in _ENDED:  # created, and not heard of
                await asyncio.sleep(0.2)
        async for file in self._proxy.files.list():
            self.counts["of batches" if "batch" in file.purpose else "uploaded, unheard"] += 1
            await self._proxy.files.delete(file.id, extra_query={"wait": "erased"})


def _line(number: str, file_id: str) -> str:
    """A request of a batch."""
    body = {"model": file_id, "messages": _QUESTION, "temperature": 0, "max_completion_tokens": 32}
    return json.dumps({"custom_id": number, "method": "POST", "url": "/v1/chat/completions", "body": body})


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*")) if folder.exists() else 0


async def _run(cluster: Cluster, url: str, paths: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    run = Run(url, cluster, paths, options.seed)
    await run.begin()
    asked = 0

    async def clients() -> None:
        nonlocal asked
        while asked < options.questions:
            asked += 1
            await run.question()

    async def changes() -> None:
        while asked < options.questions:
            await asyncio.sleep(0.5)
            await run.change()

    async def batches() -> None:
        while options.batch and asked < options.questions:
            await run.batch(options.batch)

    async def killer() -> int:
        meanwhile = 0
        for number in range(len(cluster.servers)):
            while asked < options.questions * (number + 1) / (len(cluster.servers) + 1):
                await asyncio.sleep(0.05)
            cluster.kill(number)
            before = asked
            await asyncio.to_thread(cluster.restart, number)
            meanwhile += asked - before
        return meanwhile

    asking = [clients() for _ in range(options.concurrency)]
    *_, meanwhile = await asyncio.gather(*asking, changes(), batches(), killer())
    while len(run.ids) < len(paths):
        await asyncio.sleep(0.1)
    await run.end()
    left, erased = cluster.left(), run.erased_seconds
    return {
        "counts": dict(run.counts),
        "questions_while_a_server_was_away": meanwhile,
        "erased_seconds": {"median": round(statistics.median(erased), 2), "max": round(max(erased), 2)},
        "left": left,
    }


def main() -> None:
    """Measure, print, and write the result."""
    from tests.support.postgres import needed_postgres

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--questions", type=int, default=1500)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--batch", type=int, default=100, help="questions in each batch; 0: no batches")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="f2l-many-") as name, needed_postgres() as postgres:
        folder = Path(name)
        paths = films(folder, options.videos, options.seed, fps=10)
        cluster = Cluster(folder, postgres.new_database(), options.servers)
        try:
            with haproxy([f"127.0.0.1:{port}" for port in _PORTS[: options.servers]], _ADDRESS, folder):
                for server in cluster.servers:
                    server.wait_ready()
                time.sleep(2)  # the proxy looks every second
                results = asyncio.run(_run(cluster, f"http://{_ADDRESS}", paths, options))
        finally:
            for server in cluster.servers:
                server.end()
    print(results)
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        record.write(options.json, configuration, results)


if __name__ == "__main__":
    main()
