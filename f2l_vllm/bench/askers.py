"""The arms at work: each asks its own server about a video, as a user would."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from openai.types import FileObject

from f2l_vllm.bench.arms import ARMS, Arm, ServerKind, about_adapter, about_frames
from f2l_vllm.bench.client import Client, WrongAnswer
from f2l_vllm.bench.costs import Costs
from f2l_vllm.bench.films import Films
from f2l_vllm.bench.running import RunningServer
from f2l_vllm.bench.servers import Room, Server, Servers, video_server
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.bench.suite import OfVideos
from f2l_vllm.client import Answer

_WAIT_SECONDS = 3600
_WARM_FRAMES, _WARM_EDGE = 2, 128
UPLOADS = 2  # at a time: the server internalizes one while the next is sent


class Askers:
    """All arms of a suite. A context manager that stops the servers it started, and leaves no file at another.

    Args:
        subject: the model to start servers with, or a server that runs.
        folder: for films, servers' data and logs.
        frames, sequences, videos, kept: what every server must have room for, as in `Room`.

    Raises:
        ValueError: the prompts are too long for the model.
    """

    def __init__(
        self,
        suite: OfVideos,
        subject: Subject | RunningServer,
        folder: Path,
        *,
        frames: int,
        sequences: int,
        videos: int,
        kept: int = 0,
    ) -> None:
        self.films = Films(folder / "films")
        self.adapter_bytes: int | None = None  # size of the adapters made here, as the server reports it
        self._suite = suite
        self._arms = [ARMS[name] for name in suite.arms]
        self._running = subject if isinstance(subject, RunningServer) else None
        self._flags: list[str] = []
        self._kept_tokens = 0
        if isinstance(subject, RunningServer):
            self.kv_bytes_per_token = subject.kv_bytes_per_token
            self._servers = Servers(lambda kind: subject, 1, self._warm)
        else:
            costs = Costs(subject)
            tokens = costs.longest_prompt(suite.questions, frames) + suite.output_tokens
            if tokens > costs.longest:
                raise ValueError(
                    f"{frames} frames make a prompt of {tokens} tokens and {subject.name} reads {costs.longest}: ask "
                    "about fewer (latency: lower count_above, and longer videos are counted)"
                )
            room = Room(tokens, sequences, frames, videos, suite.kv_gib, kept)
            self._flags, self._kept_tokens = room.flags(subject, costs), room.kept_tokens
            self.kv_bytes_per_token = costs.kv_bytes_per_token
            start = video_server(subject, folder, self._flags, suite.serve_flags, suite.servers_at_once)
            self._servers = Servers(start, suite.servers_at_once, self._warm)
        self._files: dict[tuple[ServerKind, Path], str] = {}
        self._clients: dict[str, tuple[Client, str]] = {}  # server's URL -> client, name of the model
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Askers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._open.aclose()
        finally:
            self._servers.close()

    def turn(self, number: int) -> list[Arm]:
        """The arms in the order of a round: each round begins with another arm; arms of one server stay together."""
        start = number % len(self._arms)
        rotated = self._arms[start:] + self._arms[:start]
        kinds = list(dict.fromkeys(self._kind(arm) for arm in rotated))
        return sorted(rotated, key=lambda arm: kinds.index(self._kind(arm)))

    @property
    def run_together(self) -> bool:
        """Whether all servers run at the same time, so that a change of arm starts no server."""
        return len({self._kind(arm) for arm in self._arms}) <= self._suite.servers_at_once

    def described(self) -> dict[str, Any]:
        """How the servers are started, for the result; of one that runs, what it says of itself."""
        if self._running is not None:
            return self._running.facts
        return {
            "flags_of_all": self._flags[self._flags.index("--dtype") :],
            "flags_of_arms": {arm.name: _words(self._kind(arm)) for arm in self._arms},
            "alternation": "servers run together" if self.run_together else "servers take turns, each started anew",
        }

    async def prepare(self) -> None:
        """Start as many of the servers as may run at once, and warm them up."""
        await self._servers.prepare(self._kind(arm) for arm in self._arms)

    async def upload(self, arm: Arm, videos: Sequence[Path]) -> None:
        """Make the arm's server internalize these videos and load their adapters, by one question about each."""
        client, _ = await self._client(arm)
        gate = asyncio.Semaphore(UPLOADS)

        async def one(video: Path) -> None:
            async with gate:
                await self._file(arm, client, video)

        await asyncio.gather(*(one(video) for video in videos if (self._kind(arm), video) not in self._files))

    async def ask(self, arm: Arm, video: Path, question: str, arrived: float | None = None) -> Answer:
        """Ask one question about one video; an arm that answers from adapters has uploaded the video before.

        Args:
            arrived: when the question arrived; now when None.

        Raises:
            WrongAnswer: the server answered from something else than the arm says.
        """
        client, base = await self._client(arm)
        match arm.reads:
            case "adapter":
                about = about_adapter(await self._file(arm, client, video))
            case "frames":
                about = about_frames(base, video)
            case "text":
                about = {"model": base}
        answer = await client.ask(question, started=arrived, **about)
        _check(answer, arm, waits=False)
        return answer

    async def ask_cold(self, arm: Arm, video: Path, question: str, keep: bool) -> Answer:
        """Ask the first question about a video that the server does not know; its time begins with the upload.

        Raises:
            WrongAnswer: the server knew the video, or answered from something else.
        """
        client, _ = await self._client(arm)
        started = time.perf_counter()
        file = await client.upload(video, wait=False)
        more: dict[str, Any] = {"extra_body": {"f2l": {"wait": _WAIT_SECONDS}}}
        answer = await client.ask(question, started=started, **about_adapter(file.id), **more)
        _check(answer, arm, waits=True)
        self._note(await client.file(file.id))
        if keep:
            self._files[self._kind(arm), video] = file.id
        else:
            await client.delete(file.id)
        return answer

    def fresh(self, frames: int, edge: int) -> Path:
        """A film that no server has seen, in this run or another."""
        return self.films.make(frames, edge, "fresh", uuid.uuid4().hex[:12])

    def _kind(self, arm: Arm) -> ServerKind:
        return arm.server(self._suite.merge_rate, self._kept_tokens)

    async def _client(self, arm: Arm) -> tuple[Client, str]:
        return await self._client_of(await self._servers.get(self._kind(arm)))

    async def _client_of(self, server: Server) -> tuple[Client, str]:
        if server.url not in self._clients:
            key = "none" if self._running is None else self._running.api_key
            made = Client(server.url, self._suite.output_tokens, key, tidy=self._running is not None)
            client = await self._open.enter_async_context(made)
            self._clients[server.url] = client, await client.base_model()
        return self._clients[server.url]

    async def _file(self, arm: Arm, client: Client, video: Path) -> str:
        key = self._kind(arm), video
        if key not in self._files:
            file = await client.upload(video)
            self._note(file)
            self._files[key] = file.id
            await client.ask(self._suite.questions[-1], **about_adapter(file.id))
        return self._files[key]

    def _note(self, file: FileObject) -> None:
        details: dict[str, Any] = (file.model_extra or {}).get("f2l") or {}
        self.adapter_bytes = details.get("adapter_bytes", self.adapter_bytes)

    async def _warm(self, kind: ServerKind, server: Server) -> None:
        """Do everything that a server's arms do once: the first time takes longer."""
        client, base = await self._client_of(server)
        for reads in dict.fromkeys(arm.reads for arm in self._arms if self._kind(arm) == kind):
            video = self.fresh(_WARM_FRAMES, _WARM_EDGE)
            if reads == "adapter":
                file = await client.upload(video)
                await client.ask(self._suite.questions[0], **about_adapter(file.id))
                await client.delete(file.id)
            else:
                about = about_frames(base, video) if reads == "frames" else {"model": base}
                await client.ask(self._suite.questions[0], **about)


def _words(kind: ServerKind) -> list[str]:
    return [*(f"{name}={value}" for name, value in kind.env), *kind.flags]


def _check(answer: Answer, arm: Arm, waits: bool) -> None:
    mode = answer.details.get("mode", "text")
    if mode != arm.reads:
        raise WrongAnswer(f"the arm {arm.name} was answered from {mode!r}, not from {arm.reads!r}")
    if waits and not answer.details.get("waited_seconds"):
        raise WrongAnswer(f"the arm {arm.name} was answered about a video that its server knew already")
