"""The processes of a history: PostgreSQL, servers and workers, which can be killed, stopped and started again."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import httpx
import psycopg

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.server_process import free_port
from tests.soak.history.server import REVISIONS, Place, serve
from tests.soak.history.worker import work
from tests.support.postgres import Postgres

TENANTS = ("red", "blue")
_START_SECONDS = 120.0
_LAST_LINES = 60
_FORK = multiprocessing.get_context("forkserver")
_COUNTS = {
    "files": "SELECT count(*) FROM files WHERE state NOT IN ('deleted', 'expired')",
    "adapters": "SELECT count(*) FROM adapters",
    "jobs": "SELECT count(*) FROM jobs",
    "open tombstones": "SELECT count(*) FROM tombstones WHERE done_at IS NULL",
    "bytes counted": "SELECT count(*) FROM usage",
}


class Member:
    """One server or worker: a process on a data folder of its own, or of the server that it belongs to."""

    def __init__(self, place: Place, run: Callable[[Place], None]) -> None:
        self.place, self._run = place, run
        self.start()

    def start(self) -> None:
        """On the same folder as before."""
        self.process = _FORK.Process(target=self._run, args=(self.place,), name=self.place.name)
        self.process.start()

    def kill(self) -> None:
        """At once."""
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """Let it stand still."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `stop`."""
        self._signal(signal.SIGCONT)

    def last_words(self) -> list[str]:
        """The last lines of its log."""
        return self.place.log.read_text().splitlines()[-_LAST_LINES:]

    def _signal(self, number: int) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.process.pid, number)

    @property
    def url(self) -> str:
        """Of a server."""
        return f"http://{self.place.host}:{self.place.port}"

    @property
    def memory(self) -> Path:
        """Where a server keeps its hot set."""
        digest = hashlib.sha256(str(self.place.home).encode()).hexdigest()[:12]
        return Path("/dev/shm") / f"f2l-{os.getuid()}-{digest}"

    async def until_ready(self) -> None:
        """Wait until a server is ready. One that ends while PostgreSQL is away is started again, as by supervisors."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if not self.process.is_alive():
                await asyncio.to_thread(self.start)
            try:
                async with httpx.AsyncClient(timeout=2) as client:
                    if (await client.get(f"{self.url}/ready")).status_code == 200:
                        return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
        raise RuntimeError(f"{self.place.name} does not start; its log: {self.place.home.parent}")


class Cluster:
    """Servers and workers of one database and one store. The first workers belong to the first servers.

    Args:
        hosts: network namespace and address of each server; by default all are on this machine.
        place: of every `Place`, instead of its defaults; `database` and `store` are new ones by default.
    """

    def __init__(
        self,
        folder: Path,
        postgres: Postgres,
        servers: int,
        workers: int,
        hosts: Sequence[tuple[str, str]] = (),
        **place: Any,
    ) -> None:
        assert workers <= servers
        _FORK.set_forkserver_preload(["tests.soak.history.worker"])
        self.folder, self.postgres = folder, postgres
        self.shared = {"database": postgres.new_database(), "store": f"file://{folder / 'store'}", **place}
        self.catalog = Catalog(self.shared["database"])
        self.keys = {tenant: self.catalog.add_key(tenant) for tenant in TENANTS}
        self.servers: dict[str, Member] = {}
        self.workers: dict[str, Member] = {}
        for number in range(servers):
            home = folder / f"{number}" / "home"
            home.mkdir(parents=True)
            network, host = hosts[number] if hosts else ("", "127.0.0.1")
            own = Place(f"server-{number}", home, free_port(), network=network, host=host, **self.shared)
            self.servers[own.name] = Member(own, serve)
            if number < workers:
                own = replace(own, name=f"worker-{number}", port=0)
                self.workers[own.name] = Member(own, work)

    def worker_of(self, server: str) -> Member | None:
        """The worker on this server's folder."""
        return self.workers.get(server.replace("server", "worker"))

    async def until_ready(self) -> None:
        """Wait for all servers."""
        await asyncio.gather(*(server.until_ready() for server in self.servers.values()))

    def end(self) -> None:
        """Kill everything, and remove what is in memory."""
        for member in (*self.servers.values(), *self.workers.values()):
            member.kill()
            shutil.rmtree(member.memory, ignore_errors=True)
        self.catalog.close()

    def look(self, sha256: str) -> list[str]:
        """Where there is something of a video: `store` or a server's name, and a path there."""
        adapter = REVISIONS.name(sha256)
        patterns = (f"videos/{sha256[:2]}/{sha256}*", f"adapters/{adapter}*")
        places = [("store", self.folder / "store", patterns)]
        for name, server in self.servers.items():
            places += [(name, server.place.home, patterns), (name, server.memory, (f"{adapter}*",))]
        return [
            f"{name} {path.relative_to(folder)}"
            for name, folder, patterns in places
            for pattern in patterns
            for path in folder.glob(pattern)
        ]

    async def left(self) -> dict[str, Any]:
        """What there is anywhere, of all videos; empty if there is nothing."""
        far, root = fsspec.core.url_to_fs(self.shared["store"], use_listings_cache=False)
        found: dict[str, Any] = {"store": await asyncio.to_thread(far.find, root)}
        async with httpx.AsyncClient(timeout=10) as client:
            for name, server in self.servers.items():
                folders = [server.place.home / kind for kind in ("adapters", "videos", "tmp")]
                found[f"{name} disk"] = [path for folder in folders for path in _files(folder)]
                found[f"{name} memory"] = _files(server.memory)
                found[f"{name} engine"] = (await client.get(f"{server.url}/left")).json()
        with psycopg.connect(self.shared["database"]) as connection:
            for what, query in _COUNTS.items():
                found[what] = (connection.execute(query).fetchone() or (0,))[0]
        return {what: some for what, some in found.items() if some}


def _files(folder: Path) -> list[str]:
    walked = os.walk(folder)  # which, other than `rglob`, passes over what is removed meanwhile
    return sorted(str(Path(place, name).relative_to(folder.parent)) for place, _, names in walked for name in names)
