"""Clients that upload and ask through HAProxy without a pause, and record every answer, for measurements of faults.

The servers are those of the random histories (`tests.soak.history`): everything of ours is real but the engine, which
answers with the hash of the video that it was asked about.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.soak.history.clients import tiny_video
from tests.soak.history.cluster import Cluster

NO_ANSWER = 0
_TIMEOUT_SECONDS = 120.0
_READY_SECONDS = 60.0
_BETWEEN_SECONDS = 0.05


@dataclass(frozen=True)
class Visit:
    """One request and what came of it: `says_when` is whether an error said when to ask again; `right`, whether an
    answer was the video's, or the video that was not found had been deleted."""

    kind: str
    start: float
    end: float
    status: int
    code: str
    says_when: bool
    right: bool

    @property
    def is_documented(self) -> bool:
        """Whether a client can live with it: done, not ready yet, or 429, 503 or 507 that say when to ask again."""
        if self.status in (200, 404):
            return self.right
        return self.status == 409 or (self.status in (429, 503, 507) and self.says_when)


class Visitors:
    """All clients, of one tenant. Moments are those of the monotonic clock."""

    def __init__(self, cluster: Cluster, socket: Path, folder: Path) -> None:
        self.headers = {"Authorization": f"Bearer {cluster.keys['red']}"}
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        self._proxy = httpx.AsyncClient(
            base_url="http://haproxy", transport=transport, timeout=_TIMEOUT_SECONDS, headers=self.headers
        )
        self._cluster, self._video = cluster, tiny_video(folder)
        self.visits: list[Visit] = []
        self.accepted: dict[str, str] = {}  # id -> sha256, of live files

    async def upload(self) -> str | None:
        """A video that nobody has uploaded. Returns its id if it was accepted."""
        content = self._video + (24).to_bytes(4, "big") + b"free" + os.urandom(16)
        form, files = {"purpose": "vision"}, {"file": ("video.mp4", content, "video/mp4")}
        answer = await self._send("upload", "POST", "/v1/files", data=form, files=files)
        if answer is None or answer.status_code != 200:
            return None
        file_id = answer.json()["id"]
        self.accepted[file_id] = hashlib.sha256(content).hexdigest()
        return file_id

    async def ask(self, file_id: str, wait: float = 0.0, server: str | None = None) -> int:
        """A question, through HAProxy or to one server. Returns the status."""
        question, path = {"model": file_id, "wait": wait}, "/v1/chat/completions"
        url, kind = (path, "ask") if server is None else (f"{self._cluster.servers[server].url}{path}", f"ask {server}")
        answer = await self._send(kind, "POST", url, file_id, json=question)
        return NO_ANSWER if answer is None else answer.status_code

    async def delete(self, file_id: str) -> None:
        """Until it is done."""
        del self.accepted[file_id]
        while (answer := await self._send("delete", "DELETE", f"/v1/files/{file_id}")) is None or (
            answer.status_code not in (200, 404)
        ):
            await asyncio.sleep(0.2)

    async def until_answered(self, file_ids: Sequence[str]) -> int:
        """Ask every server about each until it answers. Returns how many are lost: still not answered by all."""
        lost = 0
        for file_id in file_ids:
            deadline = time.monotonic() + _READY_SECONDS
            for server in self._cluster.servers:
                while (status := await self.ask(file_id, 5.0, server)) != 200 and time.monotonic() < deadline:
                    await asyncio.sleep(0.2)
                lost += status != 200
        return lost

    @asynccontextmanager
    async def visiting(self, uploaders: int, askers: int) -> AsyncIterator[None]:
        """Have so many clients upload and ask meanwhile; in the end each finishes its request."""
        over = asyncio.Event()

        async def uploads() -> None:
            while not over.is_set():
                await self.upload()
                await asyncio.sleep(2 * _BETWEEN_SECONDS)

        async def asks(dice: random.Random) -> None:
            while not over.is_set():
                await self.ask(dice.choice([*self.accepted]))
                await asyncio.sleep(_BETWEEN_SECONDS)

        works = [uploads() for _ in range(uploaders)] + [asks(random.Random(number)) for number in range(askers)]
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*tasks)

    async def close(self) -> None:
        """In the end."""
        await self._proxy.aclose()

    async def _send(self, kind: str, method: str, url: str, file_id: str = "", **given: Any) -> httpx.Response | None:
        start, answer, code, right, sha256 = time.monotonic(), None, "", True, self.accepted.get(file_id)
        with suppress(httpx.TransportError):
            answer = await self._proxy.request(method, url, **given)
        if answer is not None and answer.status_code != 200:
            with suppress(ValueError, KeyError, TypeError):
                code = str(answer.json()["error"]["code"])
            right = file_id not in self.accepted
        elif answer is not None and sha256 is not None:
            right = answer.json()["answer"] == sha256
        status = NO_ANSWER if answer is None else answer.status_code
        says_when = answer is not None and "retry-after" in answer.headers
        self.visits.append(Visit(kind, start, time.monotonic(), status, code, says_when, right))
        return answer


def outcome(visits: Sequence[Visit], begin: float, end: float) -> dict[str, Any]:
    """What clients met at a fault from `begin` to `end`.

    Of each kind of request: what came of those that were open while the fault lasted, how long the longest took, and
    after how many seconds from its end the last one failed and one that began then was answered.
    """
    found: dict[str, Any] = {}
    for kind in ("upload", "ask"):
        of_kind = [visit for visit in visits if visit.kind == kind]
        open_then = [visit for visit in of_kind if visit.start < end and visit.end > begin]
        later = [visit for visit in of_kind if visit.end > end]
        failed = max((visit.end - end for visit in later if visit.status not in (200, 404, 409)), default=0.0)
        again = min((visit.end - end for visit in later if visit.start > end and visit.status == 200), default=None)
        found[kind] = {
            "meanwhile": dict(Counter(f"{visit.status} {visit.code}".strip() for visit in open_then)),
            "longest_s": round(max((visit.end - visit.start for visit in open_then), default=0.0), 2),
            "last_failure_after_s": round(failed, 2),
            "answered_again_after_s": None if again is None else round(again, 2),
        }
    wrong = [visit for visit in visits if not visit.is_documented]
    found["wrong"] = dict(Counter(f"{visit.kind}: {visit.status} {visit.code}".strip() for visit in wrong))
    return found


async def until_nothing_is_left(cluster: Cluster, most_seconds: float) -> tuple[float, dict[str, Any]]:
    """Seconds until there is nothing anywhere (rows, store, disks, memory, engines), and what is left then."""
    started = time.monotonic()
    while (found := await cluster.left()) and time.monotonic() < started + most_seconds:
        await asyncio.sleep(0.02)
    return time.monotonic() - started, found
