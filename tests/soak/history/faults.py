"""Faults at random: of servers, of workers, of PostgreSQL. Each is over when what it met is ready again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from random import Random

from tests.soak.history.clients import Client
from tests.soak.history.cluster import Cluster, Member
from tests.soak.history.operations import Operation
from tests.soak.history.pace import BEAT_SECONDS, SILENT_SECONDS

_BETWEEN_SECONDS = (0.3, 2.5)
_DOWN_SECONDS = (0.1, 2.0)
_STILL_SECONDS = (0.5, 4.0)
_GIVEN_UP_SECONDS = (SILENT_SECONDS + 1, SILENT_SECONDS + 4)
_WATCH_SECONDS = 0.2
_TOLD_SECONDS = 4 * BEAT_SECONDS  # by then a server has noticed that it was given up
KINDS = ("kill a server", "stop a server", "give up a server", "kill a worker", "stop a worker", "give up a worker")
KINDS += ("restart postgres",)


class Faults:
    """Harms the processes of a cluster, of each kind as often as of any other, and records when.

    `client` has a key of its own revoked while a server stands still that knows it.
    """

    def __init__(self, cluster: Cluster, client: Client, history: list[Operation], dice: Random) -> None:
        self._cluster, self._client, self._history, self._dice = cluster, client, history, dice
        self._harmed: set[str] = set()  # by name
        self._tasks: set[asyncio.Task[None]] = set()

    async def work(self, until: float) -> None:
        """Until this moment of the monotonic clock; then all are over."""
        coming: list[str] = []
        while time.monotonic() < until:
            coming = coming or self._dice.sample(KINDS, len(KINDS))
            if (kind := next((kind for kind in coming if self._begin(kind)), None)) is not None:
                coming.remove(kind)
            await asyncio.sleep(self._dice.uniform(*_BETWEEN_SECONDS))
        await asyncio.gather(*self._tasks)

    async def watch(self) -> None:
        """Record who ends by himself, and start him again, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for name, member in {**self._cluster.servers, **self._cluster.workers}.items():
                if name not in self._harmed and not member.process.is_alive():
                    now = time.time()
                    self._history.append(Operation("died", now, now, server=name, found=member.last_words()))
                    await asyncio.to_thread(member.start)

    def _begin(self, kind: str) -> bool:
        """Harm somebody in this way; False if nobody can be now."""
        if kind == "restart postgres":
            is_well = "postgres" not in self._harmed
            if is_well:
                self._run(kind, "postgres", self._restart_postgres)
            return is_well
        what, _, whom = kind.rpartition(" a ")
        members = self._cluster.servers if whom == "server" else self._cluster.workers
        free = sorted(set(members) - self._harmed)
        if len(free) < (2 if whom == "server" else 1):  # one server is left in peace
            return False
        name = self._dice.choice(free)
        if what == "kill":
            self._run(kind, name, lambda: self._kill(name, members[name]))
        else:
            seconds = self._dice.uniform(*(_STILL_SECONDS if what == "stop" else _GIVEN_UP_SECONDS))
            stop = self._give_up if kind == "give up a server" else self._stop
            self._run(kind, name, lambda: stop(name, members[name], seconds))
        return True

    def _run(self, kind: str, name: str, harm: Callable[[], Awaitable[None]]) -> None:
        self._harmed.add(name)

        async def whole() -> None:
            start = time.time()
            try:
                await harm()
            finally:
                self._harmed.discard(name)
                self._history.append(Operation("fault", start, time.time(), server=name, code=kind))

        task = asyncio.create_task(whole())
        self._tasks.add(task)

    async def _kill(self, name: str, member: Member) -> None:
        """A server takes its worker with it, and brings it back."""
        together = [member]
        if (worker := self._cluster.worker_of(name)) is not None and worker is not member:
            while worker.place.name in self._harmed:  # it stands still
                await asyncio.sleep(0.05)
            together.append(worker)
            self._harmed.add(worker.place.name)
        try:
            for one in together:
                await asyncio.to_thread(one.kill)
            await asyncio.sleep(self._dice.uniform(*_DOWN_SECONDS))
            for one in together:
                await asyncio.to_thread(one.start)
            if name in self._cluster.servers:
                await member.until_ready()
        finally:
            if len(together) > 1:
                self._harmed.discard(together[1].place.name)

    async def _stop(self, name: str, member: Member, seconds: float) -> None:
        member.stop()
        await asyncio.sleep(seconds)
        member.go_on()
        if name in self._cluster.servers:
            await member.until_ready()
            await asyncio.sleep(_TOLD_SECONDS)
            await member.until_ready()

    async def _give_up(self, name: str, server: Member, seconds: float) -> None:
        """Nobody waits for it when a key is revoked that it knows, and it is asked with that key before it goes on."""
        key = await self._client.known_key(name)
        asking = asyncio.create_task(self._client.ask_when_revoked(name, key)) if key is not None else None
        await self._stop(name, server, seconds)
        if asking is not None:
            await asking

    async def _restart_postgres(self) -> None:
        await asyncio.to_thread(self._cluster.postgres.stop)
        await asyncio.sleep(self._dice.uniform(*_DOWN_SECONDS))
        self._cluster.postgres.start()  # in this thread: it ends with the thread that starts it
