"""`python -m benchmarks.cluster`: what Ray Serve, HAProxy and a front add to an engine, over engines without models.

Each engine answers `SLOTS` questions at a time: 60 ms, then 20 tokens, one every 15 ms. Throughput is measured with
twice as many clients as slots, so that there is always work, over 200 videos alike. What is added to the first token is
the difference to the engine itself, asked in turns. CPU is that of all processes but engines and clients, less what
they take while nothing is asked; a question's is that of an answer of one token, a chunk's that of each further one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from f2l_vllm.bench import record
from f2l_vllm.cluster import local
from f2l_vllm.server_process import LOOPBACK, free_port

SLOTS, ENGINES, VIDEOS = 4, 4, 200
_ANSWER = {"first_ms": 60, "max_tokens": 20, "ms": 15}
_ROOT = Path(__file__).parents[1]
_TICK = os.sysconf("SC_CLK_TCK")
_EXTERN = "0.0.0.0"  # with HAProxy, fronts listen at every address


def _cpu_seconds(session: int) -> float:
    """What all processes of a session have taken so far, engines left out."""
    taken = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and "fake_engine" not in (entry / "cmdline").read_text():
                taken += int(fields[11]) + int(fields[12])
        except OSError:
            continue  # it has ended
    return taken / _TICK


@asynccontextmanager
async def _clients() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        yield http


async def _ask(http: aiohttp.ClientSession, url: str, video: int, **answer: float) -> float:
    """Seconds to the first byte of the answer, which is read to its end."""
    question = {"model": f"file-{video % VIDEOS}", "messages": [], "stream": True, **_ANSWER, **answer}
    began = time.perf_counter()
    async with http.post(f"{url}/v1/chat/completions", json=question) as response:
        text = await response.content.readany()
        first = time.perf_counter() - began
        text += await response.content.read()
    if response.status != 200 or not text.rstrip().endswith(b"[DONE]"):
        raise RuntimeError(f"{response.status} {text[-200:]!r}")
    return first


async def _busy(url: str, clients: int, seconds: float, **answer: float) -> tuple[int, float]:
    """Answers that so many clients got, and the seconds it took until the last one had its own."""
    began, count = time.perf_counter(), 0

    async def client(http: aiohttp.ClientSession, number: int) -> None:
        nonlocal count
        while time.perf_counter() - began < seconds:
            await _ask(http, url, number + clients * count, **answer)
            count += 1

    async with _clients() as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))
    return count, time.perf_counter() - began


async def _added_ms(url: str, engine: str, questions: int) -> dict[str, float]:
    """Medians of the time to the first byte of an engine and of the service, asked in turns."""
    times: dict[str, list[float]] = {url: [], engine: []}
    async with _clients() as http:
        for number in range(questions + 10):
            for where, seen in times.items():
                seconds = await _ask(http, where, number, max_tokens=1)
                if number >= 10:
                    seen.append(seconds * 1e3)
    through, alone = (statistics.median(seen) for seen in times.values())
    return {"through": round(through, 2), "engine": round(alone, 2), "added": round(through - alone, 2)}


async def _cpu(url: str, session: int, seconds: float) -> dict[str, float]:
    """Of a question and of each further chunk, in milliseconds and microseconds."""
    began = _cpu_seconds(session)
    await asyncio.sleep(seconds)
    idle = (_cpu_seconds(session) - began) / seconds
    costs = []
    for tokens in (1, _ANSWER["max_tokens"] + 1):
        began = _cpu_seconds(session)
        count, took = await _busy(url, 2 * SLOTS, seconds, max_tokens=tokens)
        costs.append((_cpu_seconds(session) - began - idle * took) / count)
    chunk = (costs[1] - costs[0]) / _ANSWER["max_tokens"]
    return {
        "question_ms": round(costs[0] * 1e3, 2),
        "chunk_us": round(chunk * 1e6),
        "idle_cores": round(idle, 3),
    }


def _until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing after {seconds:g} s")
        time.sleep(0.2)


def _measure(node: local.Node, wanted: dict[str, Any], url: str, options: argparse.Namespace) -> dict[str, Any]:
    from f2l_vllm.cluster import state

    throughput = {}
    results: dict[str, Any] = {}
    for engines in (ENGINES, 1):
        wanted["applications"][0]["deployments"][1]["num_replicas"] = engines
        local.deploy(wanted, node.address, {})
        if not throughput:
            state.connect(node.address)
        state.wait_running(180)
        _until(lambda count=engines: len(state.engines()) == count)
        asyncio.run(_busy(url, 2 * SLOTS * engines, 2))
        count, took = asyncio.run(_busy(url, 2 * SLOTS * engines, options.seconds))
        throughput[engines] = round(count / took, 2)
        print(f"{engines} engines: {throughput[engines]} questions/s", flush=True)
        if engines == ENGINES:
            results["cpu"] = asyncio.run(_cpu(url, node.pid, options.seconds))
            print(results["cpu"], flush=True)
    results["first_token_ms"] = asyncio.run(_added_ms(url, next(iter(state.engines().values())), options.questions))
    ratio = round(throughput[ENGINES] / throughput[1], 2)
    return {**results, "throughput": {**throughput, "ratio": ratio}}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proxy", choices=("haproxy", "serve"), default="haproxy", help="what stands before the front")
    parser.add_argument("--fronts", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--questions", type=int, default=200, help="to compare first tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="f2l-cluster-") as folder:
        home, port = Path(folder), free_port()
        host = _EXTERN if options.proxy == "haproxy" else LOOPBACK
        os.environ.update({**local.environment(home, host), "PYTHONPATH": str(_ROOT)})
        wanted = local.config(
            "none", ["--slots", str(SLOTS)], engines=1, fronts=options.fronts, workers=0, host=host, port=port
        )
        command = f"{shlex.quote(sys.executable)} -m tests.support.fake_engine"
        wanted["applications"][0]["args"] |= {"command": command, "concurrency": SLOTS}
        node = local.Node.start(home, {})
        from f2l_vllm.cluster import state  # Ray reads the variables when it is imported

        try:
            results = _measure(node, wanted, f"http://{LOOPBACK}:{port}", options)
        finally:
            state.disconnect()
            node.stop(home)
    print(results)
    if options.json is not None:
        given = {name: value for name, value in vars(options).items() if name != "json"}
        record.write(options.json, {**given, "slots": SLOTS, "answer": _ANSWER, "videos": VIDEOS}, results)


if __name__ == "__main__":
    main()
