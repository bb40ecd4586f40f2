"""What clients talk to: Ray Serve's ingress, which relays every request to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from f2l_vllm import logs
from f2l_vllm.cluster.membership import ENGINES
from f2l_vllm.cluster.relay import Engine, Relay


class Front:
    """A deployment of any number of replicas, without GPU, keys, catalog and store.

    Args:
        engines: the deployment of engines.
        others: deployments that run beside it; Serve starts what its ingress names.
    """

    def __init__(self, engines: DeploymentHandle, *others: DeploymentHandle) -> None:
        logs.configure("front")
        self._engines = engines
        self._listening: asyncio.Task[Engine] | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app that Serve runs; called once."""
        return Relay(self._choose, ENGINES).app()

    async def check_health(self) -> None:
        """Called every second: the first time, begin to hear which engines there are, before anybody asks."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._choose("", ()))

    async def engines(self) -> dict[str, dict[str, Any]]:
        """What this front knows of the engines: `url`, and `load`, questions in work there."""
        loads = ENGINES.loads()
        return {name: {"url": url, "load": loads.get(name)} for name, url in ENGINES.urls().items()}

    async def _choose(self, key: str, tried: Collection[str]) -> Engine:
        # Nothing is reserved at the replica: questions go to its server, which queues them itself.
        asked: Any = self._engines.choose_replica(key=key, tried=tuple(tried), _reserve=False)
        async with asked as selection:
            told = selection.replica_metadata
        return Engine(told["name"], told["url"])
