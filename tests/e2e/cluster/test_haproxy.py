"""HAProxy with its configuration: the policy `haproxy` chooses as it does, and a server's death fails no question."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from benchmarks.haproxy import find_haproxy, proxied
from benchmarks.plan_check import client_of
from f2l_vllm.cluster.policy import HAProxyHash
from f2l_vllm.server_process import free_port
from tests.support import ROOT

_QUESTIONS = 60
_CLIENTS, _KILLS = 6, 8

pytestmark = pytest.mark.skipif(find_haproxy() is None, reason="HAProxy is not installed (apt-get install haproxy)")


class Holder:
    """A server that is ready, and keeps every question it gets in work."""

    def __init__(self, name: str, got: asyncio.Queue[tuple[str, str]]) -> None:
        self._name, self._got = name, got

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if length := re.search(rb"content-length: (\d+)", head):
            self._got.put_nowait((json.loads(await reader.readexactly(int(length[1])))["model"], self._name))
            await reader.read()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()


async def choices(names: list[str], folder: Path) -> tuple[list[str], list[str]]:
    """Servers chosen by the policy and by HAProxy, each question with all before it in work; two in five about one
    video."""
    rng, got = random.Random(5), asyncio.Queue[tuple[str, str]]()
    servers = [await asyncio.start_server(Holder(name, got).talk, "127.0.0.1", 0) for name in names]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    policy, loads, expected, chosen = HAProxyHash(names), dict.fromkeys(names, 0), list[str](), list[str]()

    async with client_of(ports, None, folder) as client:

        async def ask(video: str) -> httpx.Response:
            return await client.post("http://haproxy/v1/chat/completions", json={"model": video})

        asked = []
        for _ in range(_QUESTIONS):
            video = rng.choice(["popular", "popular", *(f"file-{rng.randrange(1000)}" for _ in range(3))])
            expected.append(policy.choose(video, loads))
            asked.append(asyncio.create_task(ask(video)))
            arrived, server = await asyncio.wait_for(got.get(), 30)
            assert arrived == video
            chosen.append(server)
            loads[server] += 1
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    for server in servers:
        server.close()
    return expected, chosen


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_policy_chooses_what_haproxy_chooses(count: int, tmp_path: Path) -> None:
    expected, chosen = asyncio.run(choices([f"server-{number}" for number in range(count)], tmp_path))
    assert chosen == expected
    assert len(set(chosen)) == count


class Slow:
    """A process that answers each question after a while."""

    def __init__(self) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "tests.support.slow_server", str(self.port), "0.2"]
        self._process = subprocess.Popen(command, cwd=ROOT)
        until = time.monotonic() + 60
        while not self._listens():
            assert time.monotonic() < until
            time.sleep(0.02)

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


async def statuses(servers: list[Slow], folder: Path) -> set[int]:
    """Of questions that are in work at two servers when the second is killed; clients keep their connections."""
    with proxied([f"127.0.0.1:{server.port}" for server in servers], folder) as path:
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, timeout=60) as client:

            async def ask(number: int) -> int:
                answer = await client.post("http://haproxy/v1/chat/completions", json={"model": f"file-{number}"})
                return answer.status_code

            before = await asyncio.gather(*(ask(number) for number in range(_CLIENTS)))
            asked = [asyncio.create_task(ask(number)) for number in range(_CLIENTS)]
            await asyncio.sleep(0.1)
            servers[1].kill()
            return {*before, *await asyncio.gather(*asked)}


@pytest.mark.parametrize("number", range(_KILLS))
def test_no_question_fails_that_had_no_answer_when_one_of_two_servers_was_killed(number, tmp_path):
    servers = [Slow(), Slow()]
    try:
        assert asyncio.run(statuses(servers, tmp_path)) == {200}
    finally:
        for server in servers:
            server.kill()
