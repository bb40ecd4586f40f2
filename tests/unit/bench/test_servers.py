"""Servers are started once, kept, and no more of them run than may."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from f2l_vllm.bench import shapes
from f2l_vllm.bench.arms import ARMS, ServerKind
from f2l_vllm.bench.costs import Costs
from f2l_vllm.bench.servers import Room, Servers, engine_share, video_server
from f2l_vllm.cli import gpus
from f2l_vllm.cli.serve import plan
from f2l_vllm.engine.defaults import GPU_MEMORY

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


def test_servers_that_run_together_divide_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[tuple[str, ...], dict[str, str]]] = []
    monkeypatch.setattr(
        "f2l_vllm.bench.servers.ServerProcess",
        lambda _model, _home, *flags, env: started.append((flags, env)),
    )
    subject = shapes.of_shape(shapes.TINY, tmp_path)
    monkeypatch.setattr(gpus, "find", lambda: gpus.Gpus(("0",), 80 << 30, 1, (13, 0)))
    parts = []
    for arm in ("adapter", "frames-cached"):
        room = Room(tokens=1000, sequences=3, frames=12, videos=4)
        start = video_server(subject, tmp_path, room.flags(subject, Costs(subject)), [], at_once=2)
        start(ARMS[arm].server(0.7, 2048))
        flags, env = started[-1]
        words = ["bfloat16" if word == "float32" else word for word in flags]
        given = {"F2L_HYPERNETWORK_WORKERS": "0"} if "--hypernetwork-workers" in words else {}
        shares = plan("f2l-tiny", env | given, vllm_words(words)).shares
        parts.append((shares.engine or 0) + shares.worker)
    assert sum(parts) <= GPU_MEMORY
    assert min(parts) > 0.4


def vllm_words(words: list[str]) -> list[str]:
    """Those that are vLLM's own."""
    own = ("--hypernetwork", "--hypernetwork-workers", "--max-frames", "--fps", "--worker-cpus", "--queue-limit")
    pairs = [(word, following) for word, following in zip(words, [*words[1:], ""], strict=True)]
    left_out = {index for index, (word, _) in enumerate(pairs) if word in own}
    return [w for index, w in enumerate(words) if index not in left_out and index - 1 not in left_out]


def test_engines_alone_divide_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_share(2) == []  # without a GPU vLLM takes it for a part of the machine's memory
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert engine_share(2) == ["--gpu-memory-utilization", "0.46"]
    assert engine_share(3) == ["--gpu-memory-utilization", "0.3"]
    assert engine_share(1) == []


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
