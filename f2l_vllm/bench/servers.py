"""The servers that arms ask: each is started once and kept over rounds; a limited number runs at a time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from f2l_vllm.bench.arms import ServerKind
from f2l_vllm.bench.costs import Costs
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.cpu.plugin import openmp_defaults
from f2l_vllm.engine.defaults import GPU_MEMORY
from f2l_vllm.server_process import ServerProcess


class Server(Protocol):
    """What `Servers` has to know of one."""

    @property
    def url(self) -> str:
        """Without `/v1`."""

    def wait_ready(self) -> None:
        """Return when it is ready, or raise `ServerFailed`."""

    def end(self) -> None:
        """Stop it."""


Start = Callable[[ServerKind], Server]
Warm = Callable[[ServerKind, Server], Awaitable[None]]

_LEAST_KV = 256 << 20
_MOST_BATCHED = 8192  # tokens of one step: the text layers' activations grow with their number


@dataclass(frozen=True)
class Room:
    """What a server must have room for.

    Attributes:
        tokens: of the longest prompt and its answer.
        sequences: in work at a time.
        frames: of the longest video.
        videos: whose adapters stay in host memory.
        kv_gib: size of the KV cache; None: enough for all sequences at their longest, and for the `kept` videos.
        kept: number of videos whose KV the server is to keep.
    """

    tokens: int
    sequences: int
    frames: int
    videos: int
    kv_gib: float | None = None
    kept: int = 0

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return -(-self.tokens // 256) * 256

    @property
    def step(self) -> int:
        """Tokens of a step."""
        return min(max(self.length, 2048), _MOST_BATCHED)

    @property
    def kept_tokens(self) -> int:
        """Tokens of all kept videos; at least those of a step."""
        return max(self.step, self.kept * self.length)

    def flags(self, subject: Subject, costs: Costs) -> list[str]:
        """Flags for `f2l-vllm serve`, the same for all arms."""
        kv = max(_LEAST_KV, int(self.length * (self.sequences + self.kept + 1) * costs.kv_bytes_per_token))
        if self.kv_gib is not None:
            kv = int(self.kv_gib * 2**30)
        sampling = {"video": {"max_frames": self.frames, "fps": 1}}
        chosen = {
            "--hypernetwork": subject.hypernetwork,
            "--dtype": subject.dtype,
            "--max-model-len": self.length,
            "--max-num-seqs": self.sequences,
            "--max-num-batched-tokens": self.step,
            "--kv-cache-memory-bytes": kv,
            "--max-loras": self.sequences,
            "--max-cpu-loras": self.videos + self.sequences,
            "--max-frames": self.frames,
            "--fps": 1,
            "--media-io-kwargs": json.dumps(sampling),
            "--worker-cpus": os.cpu_count(),
            "--queue-limit": max(256, self.videos),
        }
        return [word for flag, value in chosen.items() for word in (flag, str(value))]


class EngineProcess(ServerProcess):
    """`vllm serve MODEL` with this package's engine and without videos, to measure what LoRA alone costs."""

    ready_path = "/health"

    def command(self, model: str) -> list[str]:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


ENGINE_ENV = {"VLLM_PLUGINS": "f2l,f2l_cpu", **openmp_defaults({})}


class Servers:
    """Running servers by their kind.

    Args:
        start: starts one.
        at_once: most that run at a time; starting another one stops the least recently asked one.
        warm: warms up a server that has become ready, before it is measured.
    """

    def __init__(self, start: Start, at_once: int, warm: Warm) -> None:
        self._start = start
        self._at_once = at_once
        self._warm = warm
        self._running: dict[ServerKind, Server] = {}  # most recently asked last
        self.starts = 0

    async def prepare(self, kinds: Iterable[ServerKind]) -> None:
        """Start as many of these servers together as may run at once."""
        chosen = [kind for kind in dict.fromkeys(kinds) if kind not in self._running]
        await self._start_all(chosen[: self._at_once - len(self._running)])

    async def get(self, kind: ServerKind) -> Server:
        """A ready server.

        Raises:
            ServerFailed: it did not start.
        """
        if kind not in self._running:
            while len(self._running) >= self._at_once:
                oldest = next(iter(self._running))
                await asyncio.to_thread(self._running.pop(oldest).end)
            await self._start_all([kind])
        self._running[kind] = self._running.pop(kind)
        return self._running[kind]

    def close(self) -> None:
        """Stop all."""
        while self._running:
            self._running.popitem()[1].end()

    async def _start_all(self, kinds: list[ServerKind]) -> None:
        # Start them in this thread: Linux stops a server when the thread that started it ends.
        for kind in kinds:
            self._running[kind] = self._start(kind)
            self.starts += 1
        for kind in kinds:
            await asyncio.to_thread(self._running[kind].wait_ready)
        for kind in kinds:
            await self._warm(kind, self._running[kind])


def gpu_share(at_once: int) -> dict[str, str]:
    """The variable by which each of so many servers on the same GPUs keeps to its part."""
    return {"F2L_GPU_SHARE": f"{1 / at_once:.4f}"} if at_once > 1 else {}


def engine_share(at_once: int) -> list[str]:
    """The same as a flag for `vllm serve`; without a GPU vLLM means the machine's memory by it."""
    if at_once == 1 or not torch.cuda.is_available():
        return []
    return ["--gpu-memory-utilization", f"{math.floor(100 * GPU_MEMORY / at_once) / 100:g}"]


def video_server(
    subject: Subject, folder: Path, flags: list[str], serve_flags: Iterable[str], at_once: int = 1
) -> Start:
    """A function that starts `f2l-vllm serve`; each kind has its own data folder in `folder`, and finds it again.

    Args:
        flags: for all kinds; a kind's own flags follow them, and `serve_flags` come last.
        at_once: how many such servers run on this machine's GPUs.
    """
    more = [word for flag in serve_flags for word in shlex.split(flag)]

    def start(kind: ServerKind) -> ServerProcess:
        mark = hashlib.sha256(repr((subject.name, kind)).encode()).hexdigest()[:8]
        workers = [] if kind.workers else ["--hypernetwork-workers", "0"]
        return ServerProcess(
            subject.model,
            folder / f"home-{mark}",
            *(*flags, *workers, *kind.flags, *more),
            env={**gpu_share(at_once), **dict(kind.env)},
        )

    return start
