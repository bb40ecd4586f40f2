"""Clients that do at random what clients do, and record it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx

from f2l_vllm.catalog.keys import key_hash
from f2l_vllm.store.errors import Unavailable
from tests.soak.history.cluster import TENANTS, Cluster
from tests.soak.history.operations import NO_ANSWER, Operation

_TIMEOUT_SECONDS = 60.0  # longer than a transaction waits for those of a server that stands still, several times
_MOST_FILES = 14  # of a tenant; beyond this, clients delete
_WAITS = (0.5, 3.0)
_EXPIRIES = (1, 6)  # seconds, from and to
_THINK_SECONDS = 0.02
_SOON_SECONDS = 0.05
_KEY_SECONDS = 1.5  # at most, between a key's beginning and its end
_TICK_SECONDS = 0.05
_LAST_LINES = 60  # of a traceback
_UNKNOWN = "file-unknown"  # a question that the key alone decides


@dataclass
class Known:
    """What the clients of all tenants know of each other's files."""

    video: bytes
    contents: list[bytes] = field(default_factory=list)
    live: dict[str, dict[str, str]] = field(default_factory=lambda: {tenant: {} for tenant in TENANTS})  # id -> sha256
    gone: dict[str, deque[str]] = field(default_factory=lambda: {tenant: deque(maxlen=10) for tenant in TENANTS})
    revoked: dict[str, deque[str]] = field(default_factory=lambda: {tenant: deque(maxlen=10) for tenant in TENANTS})
    uploads: int = 0

    def fresh(self, dice: Random) -> bytes:
        """A video that nobody has uploaded: an mp4 may end with bytes that mean nothing."""
        content = self.video + (24).to_bytes(4, "big") + b"free" + dice.randbytes(16)
        self.contents = [*self.contents[-20:], content]
        return content


class Client:
    """One client of one tenant."""

    def __init__(self, name: str, tenant: str, cluster: Cluster, known: Known, history: list[Operation]) -> None:
        self.name, self.tenant = name, tenant
        self._cluster, self._known, self._history = cluster, known, history
        # A connection for each request: one that is kept open may be of a server that was killed meanwhile.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, limits=limits, headers=_with(cluster.keys[tenant]))

    async def close(self) -> None:
        """In the end."""
        await self._http.aclose()

    async def work(self, seed: str, until: float) -> None:
        """Do things at random until this moment of the monotonic clock."""
        dice = Random(seed)
        while time.monotonic() < until:
            await self.step(dice)
            await asyncio.sleep(dice.expovariate(1 / _THINK_SECONDS))

    async def step(self, dice: Random) -> None:
        """One thing."""
        known, server = self._known, dice.choice(list(self._cluster.servers))
        mine = list(known.live[self.tenant])
        crowded = len(mine) > _MOST_FILES
        weights: dict[Callable[[], Any], float] = {
            lambda: self.upload(server, known.fresh(dice)): 1 if crowded else 8,
            lambda: self.upload(server, known.fresh(dice), dice.randint(*_EXPIRIES), dice.random() < 0.5): 4,
            lambda: self.list(server): 3,
        }
        if known.contents:
            weights[lambda: self.upload(server, dice.choice(known.contents))] = 1 if crowded else 7
        if mine:
            file_id = dice.choice(mine)
            weights[lambda: self.ask(server, file_id)] = 40
            weights[lambda: self.ask(server, file_id, dice.uniform(*_WAITS))] = 12
            weights[lambda: self.content(server, file_id)] = 4
            weights[lambda: self.delete(server, file_id)] = 12 if crowded else 5
            weights[lambda: self.delete(server, file_id, erased=True)] = 4 if crowded else 2
            weights[lambda: self.everything(dice, file_id)] = 3
            weights[lambda: self.with_another_key(dice, file_id)] = 2
            if known.revoked[self.tenant]:
                weights[lambda: self.ask(server, file_id, key=dice.choice(known.revoked[self.tenant]))] = 4
        if known.gone[self.tenant]:
            weights[lambda: self.ask(server, dice.choice(known.gone[self.tenant]))] = 8
        if theirs := [file_id for tenant in TENANTS if tenant != self.tenant for file_id in known.live[tenant]]:
            weights[lambda: self.ask(server, dice.choice(theirs))] = 2
            weights[lambda: self.delete(server, dice.choice(theirs))] = 1
        (chosen,) = dice.choices(list(weights), list(weights.values()))
        await chosen()

    async def upload(
        self, server: str, content: bytes, expires_after: int | None = None, is_idle: bool = False
    ) -> Operation:
        """Upload, for good or for some seconds: after now, or after its last use."""
        self._known.uploads += 1
        name, sha256 = f"{self.name}-{self._known.uploads}.mp4", hashlib.sha256(content).hexdigest()
        form: dict[str, str] = {"purpose": "vision"}
        if expires_after is not None:
            anchor = "last_used_at" if is_idle else "created_at"
            form |= {"expires_after[anchor]": anchor, "expires_after[seconds]": str(expires_after)}
        idle = float(expires_after) if is_idle and expires_after is not None else None
        sent: dict[str, Any] = {"name": name, "sha256": sha256, "idle_seconds": idle}

        def read(answer: httpx.Response) -> dict[str, Any]:
            found = answer.json()
            self._known.live[self.tenant][found["id"]] = sha256
            return {"file_id": found["id"], "expires_at": found["expires_at"]}

        files = {"file": (name, content, "video/mp4")}
        return await self._do("upload", server, "POST", "/v1/files", read, sent, data=form, files=files)

    async def ask(self, server: str, file_id: str, wait: float = 0.0, key: str = "") -> Operation:
        """A question, which may wait until the video is ready; `key`: instead of the one that the tenant keeps."""

        def read(answer: httpx.Response) -> dict[str, Any]:
            return {"sha256": answer.json()["answer"]}

        sent, given = {"file_id": file_id, "key": key and key_hash(key)}, {"json": {"model": file_id, "wait": wait}}
        given |= {"headers": _with(key)} if key else {}
        done = await self._do("ask", server, "POST", "/v1/chat/completions", read, sent, **given)
        if done.status == 404:
            self._forget(file_id)  # it has expired
        return done

    async def content(self, server: str, file_id: str) -> Operation:
        """The bytes."""

        def read(answer: httpx.Response) -> dict[str, Any]:
            return {"sha256": hashlib.sha256(answer.content).hexdigest()}

        return await self._do("content", server, "GET", f"/v1/files/{file_id}/content", read, {"file_id": file_id})

    async def delete(self, server: str, file_id: str, *, erased: bool = False) -> Operation:
        """Delete; with `erased`, wait until nothing is left, and look."""
        sha256 = self._known.live[self.tenant].get(file_id, "")

        def read(answer: httpx.Response) -> dict[str, Any]:
            return {"erased": answer.json().get("f2l", {}).get("erased")}

        self._forget(file_id)
        given = {"params": {"wait": "erased"}} if erased else {}
        done = await self._do("delete", server, "DELETE", f"/v1/files/{file_id}", read, {"file_id": file_id}, **given)
        if done.erased and sha256:
            found = await asyncio.to_thread(self._cluster.look, sha256)
            self._note("look", done.start, file_id=file_id, sha256=sha256, found=found)
        return done

    async def everything(self, dice: Random, file_id: str) -> None:
        """All that can be done with a file and its bytes, at the same time, in some order, anywhere."""
        sha256 = self._known.live[self.tenant][file_id]
        works: list[Callable[[str], Any]] = [
            lambda server: self.delete(server, file_id, erased=dice.random() < 0.5),
            lambda server: self.ask(server, file_id, 1.0),
            lambda server: self.content(server, file_id),
            lambda server: self.content(server, file_id),
        ]
        same = [content for content in self._known.contents if hashlib.sha256(content).hexdigest() == sha256]
        works += [lambda server: self.upload(server, same[0])] if same and dice.random() < 0.5 else []
        dice.shuffle(works)

        async def soon(work: Callable[[str], Any]) -> None:
            await asyncio.sleep(dice.uniform(0, _SOON_SECONDS))
            await work(dice.choice([*self._cluster.servers]))

        await asyncio.gather(*(soon(work) for work in works))

    async def with_another_key(self, dice: Random, file_id: str) -> None:
        """Ask with a key that is added, while it is revoked, and of every server when it has been."""
        key = await self._add_key()
        if key is None:
            return
        servers = [*self._cluster.servers]

        async def soon() -> None:
            await asyncio.sleep(dice.uniform(0, _KEY_SECONDS))
            await self.ask(dice.choice(servers), file_id, key=key)

        async def revoke() -> None:
            await asyncio.sleep(dice.uniform(0, _KEY_SECONDS))
            await self._revoke(key)

        await asyncio.gather(revoke(), *(soon() for _ in servers))
        for server in servers:
            await self.ask(server, file_id, key=key)

    async def known_key(self, server: str) -> str | None:
        """A new key that this server has heard of; None if PostgreSQL is away."""
        key = await self._add_key()
        while key is not None and (await self.ask(server, _UNKNOWN, key=key)).status == 401:
            await asyncio.sleep(_KEY_SECONDS / 3)  # it reads the keys once a second at most
        return key

    async def ask_when_revoked(self, server: str, key: str) -> None:
        """Ask with a key as soon as it is revoked."""
        await self._revoke(key)
        await self.ask(server, _UNKNOWN, key=key)

    async def _add_key(self) -> str | None:
        start = time.time()
        try:
            key = await asyncio.to_thread(self._cluster.catalog.add_key, self.tenant)
        except Unavailable:
            return None
        self._note("add key", start, key=key_hash(key))
        return key

    async def _revoke(self, key: str) -> None:
        """As `f2l-vllm keys revoke`: it is done when every server has heard of it."""
        catalog, start, sha256 = self._cluster.catalog, time.time(), key_hash(key)
        self._known.revoked[self.tenant].append(key)
        try:
            number = await asyncio.to_thread(catalog.revoke_key, sha256)
            assert number is not None, "nobody else revokes this key"
            while await asyncio.to_thread(catalog.unaware, number):
                await asyncio.sleep(_TICK_SECONDS)
            self._note("revoke key", start, key=sha256)
        except Unavailable:
            self._note("revoke key", start, key=sha256, status=503, retry_after=True)

    async def list(self, server: str) -> Operation:
        """All files of the tenant's."""

        def read(answer: httpx.Response) -> dict[str, Any]:
            return {"found": [[one["id"], one["filename"]] for one in answer.json()["data"]]}

        return await self._do("list", server, "GET", "/v1/files", read, {})

    def _forget(self, file_id: str) -> None:
        if self._known.live[self.tenant].pop(file_id, None) is not None:
            self._known.gone[self.tenant].append(file_id)

    async def _do(
        self,
        kind: str,
        server: str,
        method: str,
        path: str,
        read: Callable[[httpx.Response], dict[str, Any]],
        sent: dict[str, Any],
        **given: Any,
    ) -> Operation:
        """Send a request, and record what came of it."""
        start, url = time.time(), self._cluster.servers[server].url
        values: dict[str, Any] = {"server": server, **sent}
        try:
            answer = await self._http.request(method, f"{url}{path}", **given)
            values |= {"status": answer.status_code, "retry_after": "retry-after" in answer.headers}
            values |= read(answer) if answer.status_code == 200 else _refused(answer)
        except (httpx.TransportError, ValueError) as error:  # a broken answer is none
            values |= {"status": NO_ANSWER, "code": type(error).__name__}
        return self._note(kind, start, **values)

    def _note(self, kind: str, start: float, **values: Any) -> Operation:
        done = Operation(kind, start, time.time(), client=self.name, tenant=self.tenant, **values)
        self._history.append(done)
        return done


def _with(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _refused(answer: httpx.Response) -> dict[str, Any]:
    """The error's code; of a bug, the server's traceback."""
    try:
        return {"code": str(answer.json()["error"]["code"])}
    except (ValueError, KeyError, TypeError):
        return {"found": answer.text.splitlines()[-_LAST_LINES:]}


def tiny_video(folder: Path) -> bytes:
    """A real one, of four frames."""
    from tests.support.videos import write_video

    return write_video(folder / "tiny.mp4", frames=4, fps=4, size=(32, 32)).read_bytes()
