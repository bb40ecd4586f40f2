"""`python -m benchmarks.balanced`: answers a second of several engines behind HAProxy, as a multiple of one's.

The engines have no model: each streams an answer of 20 tokens, the first after 60 ms, the others every 15 ms, to some
questions at a time, and others wait there. HAProxy runs with `launch/haproxy.cfg`. Twice as many clients as the engines
have places ask about videos, all equally often.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.haproxy import haproxy_version, proxied
from f2l_vllm.bench import record

_BAR = 0.95  # of the engines' number


class Engine:
    """Answers over HTTP as `options` say."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._room = options, asyncio.Semaphore(options.places)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection's requests, one after the other."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if (length := re.search(rb"content-length: (\d+)", head)) is None:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")  # it is ready
                    continue
                await reader.readexactly(int(length[1]))
                async with self._room:
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    for number in range(self._options.tokens):
                        await asyncio.sleep((self._options.token_ms if number else self._options.first_token_ms) / 1e3)
                        event = b"data: %d\n\n" % number
                        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


async def measure(engines: int, options: argparse.Namespace) -> dict[str, Any]:
    """Whole answers a second of so many engines, and what became of the questions."""
    dice, counts, ends = random.Random(options.seed), Counter[str](), list[float]()
    async with AsyncExitStack() as stack:
        ports = []
        for _ in range(engines):
            server = await asyncio.start_server(Engine(options).talk, "127.0.0.1", 0)
            await stack.enter_async_context(server)
            ports.append(server.sockets[0].getsockname()[1])
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f2l-balanced-")))
        starting = asyncio.to_thread(stack.enter_context, proxied([f"127.0.0.1:{port}" for port in ports], folder))
        transport = httpx.AsyncHTTPTransport(uds=str(await starting))
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, timeout=60))
        started = time.monotonic()

        async def ask() -> None:
            while time.monotonic() < started + options.seconds:
                body = {"model": f"file-{dice.randrange(options.videos)}", "stream": True}
                answer = await client.post("http://haproxy/v1/chat/completions", content=json.dumps(body))
                is_whole = answer.status_code == 200 and answer.text.count("data:") == options.tokens
                counts["whole" if is_whole else f"status {answer.status_code}"] += 1
                ends.append(time.monotonic() - started)

        await asyncio.gather(*(ask() for _ in range(2 * engines * options.places)))
    settled = [end for end in ends if options.seconds / 4 <= end < options.seconds]  # queues are full from then on
    return {"engines": engines, "answers_per_s": round(len(settled) / (options.seconds * 3 / 4), 2), **counts}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--places", type=int, default=4, help="questions that an engine answers at a time")
    parser.add_argument("--first-token-ms", type=float, default=60)
    parser.add_argument("--token-ms", type=float, default=15)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--videos", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    one, many = (asyncio.run(measure(engines, options)) for engines in (1, options.engines))
    times = round(many["answers_per_s"] / one["answers_per_s"], 2)
    print(one, many, f"{times} times as many", sep="\n")
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        configuration["haproxy"] = haproxy_version()
        record.write(options.json, configuration, {"one": one, "many": many, "times": times})
    if times < _BAR * options.engines:
        raise SystemExit(f"{options.engines} engines answer {times} times what one answers, less than {_BAR} of each")


if __name__ == "__main__":
    main()
