"""One engine: a server, `f2l-vllm serve`, as a child process that a replica of Ray Serve starts, watches and stops.

Fronts talk to the server itself. The replica and its server end together, whichever ends first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from subprocess import TimeoutExpired

import httpx
import ray

from f2l_vllm import logs
from f2l_vllm.cluster.slot import Slot
from f2l_vllm.server.middleware.load import HEADER as LOAD_HEADER
from f2l_vllm.server_process import ServerProcess
from f2l_vllm.settings import SERVER_LOCK, Settings

logger = logging.getLogger(__name__)

DEFAULT_COMMAND = f"{shlex.quote(sys.executable)} -m f2l_vllm.cli serve"
LEAVE_SECONDS = 10.0  # beyond the server's own grace
_OLD_LOGS = 3  # of servers that this one follows in its folder
_HEALTH_SECONDS = 2.0  # a server that takes longer to say that it lives hangs
_STRIKES = 3  # as many failed checks make Serve replace the replica


class Engine:
    """A deployment with one server in each replica.

    The server's settings are `F2L_*` of the replica's environment: the catalog and the store are shared by all engines.

    Args:
        model, flags: what `f2l-vllm serve` takes.
        command: what starts a server.

    Raises:
        ValueError: the settings name no catalog or no store.
        ServerFailed: the server did not become ready; the message holds the end of its log.
    """

    _server: _Server | None = None

    def __init__(self, model: str, flags: Sequence[str], command: str) -> None:
        logs.configure("engine")
        settings = Settings.read()
        if settings.database_url is None or settings.store is None:
            raise ValueError("engines share one catalog and one store: set F2L_DATABASE_URL and F2L_STORE for all")
        host = ray.util.get_node_ip_address()
        self._grace = settings.shutdown_seconds + LEAVE_SECONDS
        self._slot = Slot.take(settings.data_folder / "engines", f"home/{SERVER_LOCK}")
        self._slot.drop_old("server-*.log", _OLD_LOGS)
        self._name = f"{host}/{self._slot.folder.name}"
        self._failed, self._load, self._is_leaving = 0, 0, False
        server = self._server = _Server(command, model, self._slot.folder / "home", *flags, host=host)
        server.wait_ready()
        threading.Thread(target=self._end_with, args=(server,), daemon=True).start()
        self._told: dict[str, str] = {"name": self._name, "url": server.url}
        self._http = httpx.AsyncClient(base_url=server.url, timeout=_HEALTH_SECONDS)
        logger.info("engine %s is ready: %s", self._name, server.url)

    def record_replica_metadata(self) -> dict[str, str]:
        """What routers learn of this replica: a name that lasts over restarts, and where its server is."""
        return self._told

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler learns: the requests in this engine, running and waiting."""
        return {"load": float(self._load)}

    async def check_health(self) -> None:
        """Ask the server whether it lives; kill one that hangs, so that what waits for it is asked again elsewhere.

        Raises:
            httpx.HTTPError: it does not answer, or its engine has ended.
        """
        try:
            answer = (await self._http.get("/health")).raise_for_status()
        except httpx.HTTPError:
            self._failed += 1
            if self._failed >= _STRIKES and self._server is not None:
                self._server.process.kill()
            raise
        self._failed, self._load = 0, int(answer.headers.get(LOAD_HEADER, 0))

    async def __del__(self) -> None:
        """Serve has taken this replica out of all routers: let the server finish its answers, and end."""
        self._is_leaving = True
        if self._server is None:
            return  # it never started
        self._server.process.terminate()
        try:
            await asyncio.to_thread(self._server.process.wait, self._grace)
        except TimeoutExpired:
            self._server.process.kill()

    def _end_with(self, server: ServerProcess) -> None:
        code = server.process.wait()
        if not self._is_leaving:
            logger.error("the server of engine %s ended with exit code %s; its log: %s", self._name, code, server.log)
            os._exit(1)  # Serve notices at once, and starts another replica


class _Server(ServerProcess):
    def __init__(self, command: str, model: str, home: Path, *flags: str, host: str) -> None:
        self._words = shlex.split(command)
        home.mkdir(parents=True, exist_ok=True)
        super().__init__(model, home, *flags, host=host, env={"F2L_HYPERNETWORK_WORKERS": "0"})

    def command(self, model: str) -> list[str]:
        return [*self._words, model, "--home", str(self.home)]
