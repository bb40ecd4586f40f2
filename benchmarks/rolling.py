"""`python -m benchmarks.rolling`: every server behind HAProxy is restarted under load, then HAProxy is reloaded.

The servers are `f2l-vllm serve`, each with a worker, of one PostgreSQL and one store (a folder), behind HAProxy with
`launch/haproxy.cfg`. OpenAI's client asks all the time, every other answer streamed, and uploads videos now and then;
it does not try again by itself. One server after the other gets SIGTERM and is started again when it has ended; the
next one follows when it is ready. In the end every upload that was accepted has to answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI

from benchmarks.fleet import films
from benchmarks.haproxy import haproxy, haproxy_version
from f2l_vllm import torch_shims
from f2l_vllm.bench import record
from f2l_vllm.bench.servers import gpu_share
from f2l_vllm.server_process import LOOPBACK, ServerProcess, free_port

torch_shims.install()

_QUESTION: Any = [{"role": "user", "content": "Describe the video."}]
_BETWEEN_SECONDS = 5.0  # of load alone: before the first restart, and after each
_STOP_SECONDS = 120.0
_END_SECONDS = 300.0  # for what is left of the jobs


class Servers:
    """The servers, which can be restarted."""

    def __init__(self, options: argparse.Namespace, folder: Path, database: str) -> None:
        self._model, self._folder = options.model, folder
        self._env = {
            "F2L_DATABASE_URL": database,
            "F2L_STORE": f"file://{folder / 'store'}",
            "F2L_SHUTDOWN_DELAY_SECONDS": f"{options.delay:g}",
            **gpu_share(options.servers),
        }
        self.ports = [free_port() for _ in range(options.servers)]
        self.running = [self._start(number) for number in range(options.servers)]

    def _start(self, number: int) -> ServerProcess:
        home = self._folder / f"server-{number}" / "home"
        home.parent.mkdir(exist_ok=True)
        return ServerProcess(self._model, home, port=self.ports[number], env=self._env)

    def restart(self, number: int) -> dict[str, Any]:
        """As a supervisor does; how long it took, and the exit code."""
        server, began = self.running[number], time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(_STOP_SECONDS)
        ended = time.monotonic()
        self.running[number] = self._start(number)
        self.running[number].wait_ready()
        return {
            "exit_code": code,
            "stopped_after_s": round(ended - began, 1),
            "ready_again_after_s": round(time.monotonic() - began, 1),
        }

    def end(self) -> None:
        """Stop all."""
        for server in self.running:
            server.end()


class Clients:
    """Those that ask and upload, and how it ended for them, by what was done meanwhile: phase -> outcome -> number."""

    def __init__(self, url: str, paths: list[Path], tokens: int) -> None:
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._videos, self._tokens = [path.read_bytes() for path in paths], tokens
        self._right: list[str] = []  # each video's answer
        self._known: list[tuple[str, int]] = []  # files that are ready, and their video
        self.accepted: dict[str, int] = {}
        self.phase = "before"
        self.seen: dict[str, Counter[str]] = {}

    async def begin(self) -> None:
        """Upload every video, and hear its answer."""
        for number in range(len(self._videos)):
            file_id = await self._create(number)
            await self._openai.files.wait_for_processing(file_id, poll_interval=0.1)
            self._right.append(await self._answer(file_id, stream=False))
            self._known.append((file_id, number))

    @asynccontextmanager
    async def at_work(self, askers: int, every_seconds: float) -> AsyncIterator[None]:
        """Ask and upload as long as the block lasts; in the end each finishes its request."""
        over = asyncio.Event()

        async def asks(dice: random.Random) -> None:
            for number in itertools.count():
                if over.is_set():
                    return
                await self._ask(*dice.choice(self._known), stream=bool(number % 2))

        async def uploads() -> None:
            while not over.is_set():
                await self._upload(len(self.accepted) % len(self._videos))
                await asyncio.sleep(every_seconds)

        works = [asks(random.Random(number)) for number in range(askers)]
        tasks = [asyncio.create_task(work) for work in (*works, uploads())]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*tasks)

    async def lost(self) -> dict[str, int]:
        """Of the accepted uploads: those that nobody knows, and those without a right answer."""
        lost, until = {"uploads_lost": 0, "jobs_lost": 0}, time.monotonic() + _END_SECONDS
        for file_id, number in self.accepted.items():
            try:
                wait = max(1.0, until - time.monotonic())
                file = await self._openai.files.wait_for_processing(file_id, poll_interval=0.1, max_wait_seconds=wait)
                right = file.status == "processed" and await self._answer(file_id, False) == self._right[number]
                lost["jobs_lost"] += not right
            except RuntimeError:  # not in time
                lost["jobs_lost"] += 1
            except APIStatusError:
                lost["uploads_lost"] += 1
        return lost

    async def close(self) -> None:
        """In the end."""
        await self._openai.close()

    async def _create(self, number: int) -> str:
        """Upload the video as bytes that nobody has: with a box that players skip."""
        content = self._videos[number] + (24).to_bytes(4, "big") + b"free" + os.urandom(16)
        return (await self._openai.files.create(file=("video.mp4", content), purpose="vision")).id

    async def _answer(self, file_id: str, stream: bool) -> str:
        create = partial(self._openai.chat.completions.create, model=file_id, messages=_QUESTION, temperature=0)
        given: dict[str, Any] = {"max_completion_tokens": self._tokens, "extra_body": {"ignore_eos": True}}
        if not stream:
            return (await create(**given)).choices[0].message.content or ""
        text, reason = "", None
        try:
            async for chunk in await create(**given, stream=True):
                for choice in chunk.choices:
                    text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
        except (APIError, httpx.HTTPError) as error:
            if text:
                raise Cut(_in_words(error)) from error
            raise
        if reason is None:
            raise Cut("an end without a reason")
        return text

    async def _ask(self, file_id: str, number: int, stream: bool) -> None:
        kind, phase = "streamed" if stream else "plain", self.phase
        try:
            right = await self._answer(file_id, stream) == self._right[number]
            how = "right" if right else "wrong"
        except Cut as cut:
            how = f"cut: {cut}"
        except (APIError, httpx.HTTPError) as error:
            how = f"failed: {_in_words(error)}"
        self._note(phase, f"{kind} {how}")

    async def _upload(self, number: int) -> None:
        phase = self.phase
        try:
            self.accepted[await self._create(number)] = number
            self._note(phase, "upload accepted")
        except (APIError, httpx.HTTPError) as error:
            self._note(phase, f"upload failed: {_in_words(error)}")

    def _note(self, phase: str, how: str) -> None:
        self.seen.setdefault(phase, Counter())[how] += 1


class Cut(Exception):
    """A stream ended after its first token and before its end."""


def _in_words(error: Exception) -> str:
    if isinstance(error, APIStatusError):
        return f"{error.status_code} {error.code}"
    if isinstance(error, APIConnectionError):
        return f"{type(error).__name__} {error.__cause__!r}"
    return f"{type(error).__name__} {getattr(error, 'code', None) or error}"


async def measure(
    options: argparse.Namespace, servers: Servers, url: str, paths: list[Path], reload: Callable[[], None]
) -> dict[str, Any]:
    """All restarts, one after the other."""
    clients, restarts = Clients(url, paths, options.tokens), list[dict[str, Any]]()
    try:
        await clients.begin()
        async with clients.at_work(options.askers, options.upload_every):
            await asyncio.sleep(_BETWEEN_SECONDS)
            for number in range(options.servers):
                clients.phase = f"server {number}"
                restarts.append(await asyncio.to_thread(servers.restart, number))
                print(clients.phase, restarts[-1], dict(clients.seen.get(clients.phase, {})), flush=True)
                await asyncio.sleep(_BETWEEN_SECONDS)
            clients.phase = "haproxy"
            for _ in range(options.reloads):
                reload()
                await asyncio.sleep(_BETWEEN_SECONDS)
        seen, lost = clients.seen, await clients.lost()
    finally:
        await clients.close()
    total = sum(seen.values(), Counter[str]())
    questions = {how: count for how, count in total.items() if not how.startswith("upload")}

    def count(word: str) -> int:
        return sum(number for how, number in questions.items() if word in how)

    return {
        "questions": sum(questions.values()),
        **{word: count(f" {word}") for word in ("failed", "wrong", "cut")},
        "uploads": len(clients.accepted),
        "uploads_failed": sum(total.values()) - sum(questions.values()) - len(clients.accepted),
        **lost,
        "restarts": restarts,
        "seen": {phase: dict(counts) for phase, counts in seen.items()},
    }


def main() -> None:
    """Measure, print, and write the result."""
    from tests.support.postgres import needed_postgres

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--askers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--upload-every", type=float, default=5.0, help="seconds from one upload to the next")
    parser.add_argument("--delay", type=float, default=3.0, help="F2L_SHUTDOWN_DELAY_SECONDS")
    parser.add_argument("--reloads", type=int, default=5, help="of HAProxy")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f2l-rolling-")))
        postgres = stack.enter_context(needed_postgres())
        paths = films(folder, options.videos, seed=1, fps=10)
        servers = Servers(options, folder, postgres.new_database())
        stack.callback(servers.end)
        for server in servers.running:
            server.wait_ready()
        address = f"{LOOPBACK}:{free_port()}"
        addresses = [f"{LOOPBACK}:{port}" for port in servers.ports]
        process = stack.enter_context(haproxy(addresses, address, folder, reloads=True))
        _until_ready(f"http://{address}", process)
        reload = partial(process.send_signal, signal.SIGUSR2)
        results = asyncio.run(measure(options, servers, f"http://{address}", paths, reload))
    print(results)
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        record.write(options.json, {**configuration, "haproxy": haproxy_version()}, results)
    if wrong := faults_of(results):
        raise SystemExit("\n".join(wrong))


def _until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("HAProxy ended")


def faults_of(results: dict[str, Any]) -> list[str]:
    """What of a measurement may not be, in words."""
    counted = ("failed", "wrong", "cut", "uploads_failed", "uploads_lost", "jobs_lost")
    wrong = [f"{what.replace('_', ' ')}: {results[what]}" for what in counted if results[what]]
    codes = [restart["exit_code"] for restart in results["restarts"]]
    return wrong + ([f"exit codes: {codes}"] if any(codes) else [])


if __name__ == "__main__":
    main()
