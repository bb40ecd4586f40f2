"""Servers are started once, kept, and no more of them run than may."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from f2l_vllm.bench import shapes
from f2l_vllm.bench.arms import ARMS, ServerKind
from f2l_vllm.bench.costs import Costs
from f2l_vllm.bench.servers import Room, Servers

A, B, C = (ServerKind((name,)) for name in "abc")


class Process:
    """Notes what becomes of it; what a server is to `Servers`."""

    log: list[str]

    def __init__(self, kind: ServerKind) -> None:
        self.name = kind.flags[0]
        self.log.append(f"start {self.name}")

    def wait_ready(self) -> None:
        self.log.append(f"ready {self.name}")

    def end(self) -> None:
        self.log.append(f"end {self.name}")


def servers(at_once: int) -> tuple[Servers, list[str]]:
    Process.log = log = []

    async def warm(kind: ServerKind, server: object) -> None:
        log.append(f"warm {kind.flags[0]}")

    return Servers(Process, at_once, warm), log  # type: ignore[arg-type]


def test_servers_are_started_together_and_kept() -> None:
    some, log = servers(at_once=2)

    async def use() -> None:
        await some.prepare([A, B, A, C])
        for kind in (A, B, A, B):
            await some.get(kind)

    asyncio.run(use())
    assert log == ["start a", "start b", "ready a", "ready b", "warm a", "warm b"]
    some.close()
    assert sorted(log[6:]) == ["end a", "end b"]


def test_another_one_takes_the_place_of_the_one_longest_without_a_question() -> None:
    some, log = servers(at_once=2)

    async def use() -> None:
        for kind in (A, B, A, C, A, B):
            await some.get(kind)

    asyncio.run(use())
    assert [line for line in log if line.startswith(("start", "end"))] == [
        *("start a", "start b", "end b", "start c", "end c", "start b")
    ]
    assert log.count("warm b") == 2


def test_a_server_has_room_for_what_it_will_be_asked() -> None:
    subject = shapes.of_shape(shapes.TINY, Path("unused"))
    costs = Costs(subject)
    words = Room(tokens=1000, sequences=3, frames=12, videos=64).flags(subject, costs)
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert flags["--max-model-len"] == "1024"
    assert int(flags["--kv-cache-memory-bytes"]) >= 3 * 1000 * costs.kv_bytes_per_token
    assert int(flags["--max-cpu-loras"]) >= 64
    assert flags["--max-loras"] == flags["--max-num-seqs"] == "3"
    assert flags["--max-frames"] == "12"
    assert json.loads(flags["--media-io-kwargs"])["video"] == {"max_frames": 12, "fps": 1}


def test_videos_that_stay_known_have_room_in_the_kv_and_the_encoder_cache() -> None:
    subject = shapes.of_shape(shapes.TINY, Path("unused"))
    costs = Costs(subject)
    for videos in (64, 1000):
        room = Room(tokens=1000, sequences=3, frames=12, videos=videos, kept=videos)
        words = room.flags(subject, costs)
        assert int(words[words.index("--kv-cache-memory-bytes") + 1]) >= videos * 1000 * costs.kv_bytes_per_token
        flags = ARMS["frames-cached"].server(0.7, room.kept_tokens).flags
        assert int(flags[flags.index("--max-num-batched-tokens") + 1]) >= videos * 1000
    alone = Room(tokens=1000, sequences=3, frames=12, videos=64)
    words = alone.flags(subject, costs)
    assert words[words.index("--max-num-batched-tokens") + 1] == str(alone.kept_tokens)
