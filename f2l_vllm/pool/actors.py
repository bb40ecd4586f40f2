"""The pool's Ray actors: where they run, what each one reserves, and how they start, if need be ahead of their work."""

from __future__ import annotations

import signal
import threading
from contextlib import nullcontext
from typing import Any

import ray

from f2l_vllm.pool.config import PoolConfig
from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.pool.private_ray import few_daemons
from f2l_vllm.pool.worker import HypernetworkWorker

NAMESPACE = "f2l"
_OBJECT_STORE_BYTES = 100 * 2**20  # only small events pass through it


class Actors:
    """Starts the workers of one pool. Workers started ahead are handed out first."""

    def __init__(self, config: PoolConfig, spec: WorkerSpec) -> None:
        self._config = config
        self._spec = spec
        self._ahead: list[Any] = []  # Ray actor handles
        self._is_connected = False

    def connect(self) -> None:
        """Start a private Ray or join the cluster, unless this process belongs to one; later calls do nothing."""
        if self._is_connected or ray.is_initialized():
            return
        config = self._config
        options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": False}
        if config.ray_address is None:
            # A private Ray offers as many CPUs as the workers ask for, even if this machine has fewer cores.
            cpus = max(1, -(-config.workers * config.cpus // 1))
            options |= {
                "address": "local",
                "num_cpus": int(cpus),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        else:
            options["address"] = config.ray_address
        handler = signal.getsignal(signal.SIGTERM)
        with few_daemons() if config.ray_address is None else nullcontext():
            ray.init(**options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's would end this process at once
        self._is_connected = True

    def disconnect(self) -> None:
        """End the private Ray, or leave the cluster that was joined; either ends the workers."""
        if self._is_connected:
            ray.shutdown()

    def start_ahead(self) -> None:
        """Have all workers load before there is work for them."""
        self.connect()
        self._ahead = [self._start() for _ in range(self._config.workers)]

    def new(self) -> Any:
        """A worker, which may still be loading. Ray must be connected."""
        return self._ahead.pop() if self._ahead else self._start()

    def missing(self) -> str | None:
        """Which resources of a worker no node of the cluster has; None if a worker fits."""
        needed = {"CPU": self._config.cpus, "GPU": self._config.gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in nodes):
            return None
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in needed.items() if amount)
        have = " and ".join(f"{max((node.get(name, 0) for node in nodes), default=0):g} {name}" for name in needed)
        return f"a worker needs {wanted}, and no node of the Ray cluster has as much (the most: {have})"

    def _start(self) -> Any:
        actor: Any = ray.remote(HypernetworkWorker)
        reserved = {"num_cpus": self._config.cpus, "num_gpus": self._config.gpus}
        # One thread runs the job, the other runs `cancel`.
        return actor.options(**reserved, max_restarts=0, max_concurrency=2).remote(self._spec)
