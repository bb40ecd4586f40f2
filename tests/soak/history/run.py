"""One history: a cluster, its clients and its faults for some seconds, then peace, and then nothing may be left."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx

from tests.soak.history.checker import READY_SECONDS, Violation, violations
from tests.soak.history.clients import Client, Known, tiny_video
from tests.soak.history.cluster import TENANTS, Cluster
from tests.soak.history.faults import Faults
from tests.soak.history.operations import Operation
from tests.support.postgres import Postgres

_STORE_SECONDS = (0.0, 0.002, 0.02)  # as far away as the seed says
_CLIENTS = 4  # of each tenant
_SETTLE_SECONDS = 60.0
_DELETES_AT_ONCE = 8


@dataclass(frozen=True)
class History:
    """What happened, and what was wrong with it."""

    operations: list[Operation]
    violations: list[Violation]

    @property
    def counts(self) -> dict[str, int]:
        """Of operations by kind, status and code; of faults by what was done."""
        named = (
            f"{one.kind} {one.code if one.kind == 'fault' else f'{one.status} {one.code}'.strip()}"
            for one in self.operations
        )
        return dict(sorted(Counter(named).items()))


async def run(seconds: float, seed: int, postgres: Postgres, *, servers: int = 3, workers: int = 2) -> History:
    """Make a history of at least so many seconds, and check it."""
    dice = Random(seed)
    with tempfile.TemporaryDirectory(prefix="f2l-history-") as name:
        far = {"store_seconds": _STORE_SECONDS[seed % len(_STORE_SECONDS)]}
        cluster = Cluster(Path(name), postgres, servers, workers, **far)
        history: list[Operation] = []
        known = Known(tiny_video(Path(name)))
        clients = [
            Client(f"{tenant}-{number}", tenant, cluster, known, history)
            for tenant in TENANTS
            for number in range(_CLIENTS)
        ]
        try:
            await cluster.until_ready()
            until = time.monotonic() + seconds
            faults = Faults(cluster, clients[0], history, dice)
            watching = asyncio.create_task(faults.watch())
            await asyncio.gather(
                faults.work(until), *(client.work(f"{seed} {client.name}", until) for client in clients)
            )
            await _end(cluster, [clients[0], clients[_CLIENTS]], history)
            watching.cancel()
        finally:
            for client in clients:
                await client.close()
            await asyncio.to_thread(cluster.end)
    history.sort(key=lambda one: one.start)
    return History(history, violations(history))


async def _end(cluster: Cluster, clients: list[Client], history: list[Operation]) -> None:
    """All is well again: everything is answered by everybody, then deleted, and then nothing is left."""
    history.append(Operation("calm", time.time(), time.time(), found=list(cluster.servers)))
    await asyncio.gather(*(_ready(cluster, name, history) for name in cluster.servers))
    for client in clients:
        for server in cluster.servers:
            await client.list(server)
        await asyncio.gather(*(_answered(client, cluster, file_id) for file_id in await _listed(client, cluster)))
    for client in clients:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (listed := await _listed(client, cluster)) and time.monotonic() < deadline:
            await _delete_all(client, cluster, listed)
    await _left(cluster, history)


async def _ready(cluster: Cluster, name: str, history: list[Operation]) -> None:
    """A server says that it is."""
    start, status, why = time.time(), 0, "no answer"
    async with httpx.AsyncClient(timeout=5) as client:
        while status != 200 and time.time() < start + READY_SECONDS + 1:
            try:
                answer = await client.get(f"{cluster.servers[name].url}/ready")
                status, why = answer.status_code, answer.text
            except httpx.TransportError:
                await asyncio.sleep(0.2)
    history.append(
        Operation("ready", start, time.time(), server=name, status=status, code="" if status == 200 else why)
    )


async def _listed(client: Client, cluster: Cluster) -> list[str]:
    """The ids of all files of a tenant's, also of those whose upload nobody heard of."""
    listed = await client.list(next(iter(cluster.servers)))
    return [file_id for file_id, _ in listed.found or ()]


async def _answered(client: Client, cluster: Cluster, file_id: str) -> None:
    """Ask each server until it answers, one way or another."""
    for server in cluster.servers:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (await client.ask(server, file_id, 3.0)).status not in (200, 404, 422) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)


async def _delete_all(client: Client, cluster: Cluster, listed: list[str]) -> None:
    places, names = asyncio.Semaphore(_DELETES_AT_ONCE), list(cluster.servers)

    async def delete(number: int, file_id: str) -> None:
        async with places:
            await client.delete(names[number % len(names)], file_id, erased=True)

    await asyncio.gather(*(delete(number, file_id) for number, file_id in enumerate(listed)))


async def _left(cluster: Cluster, history: list[Operation]) -> None:
    start, found = time.time(), await cluster.left()
    while found and time.time() < start + _SETTLE_SECONDS:
        await asyncio.sleep(0.5)
        found = await cluster.left()
    history.append(Operation("left", start, time.time(), found=found))


def as_json(history: History) -> dict[str, Any]:
    """The summary."""
    asked = [one for one in history.operations if one.kind == "ask"]
    return {
        "operations": len(history.operations),
        "questions_answered": sum(one.is_done for one in asked),
        "violations": len(history.violations),
        "by_rule": dict(Counter(one.rule for one in history.violations)),
        "counts": history.counts,
    }
