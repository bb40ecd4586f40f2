"""The pool: N Ray actors, and one lane for each that feeds it jobs from the catalog.

Only one pool serves a data folder at a time (a file lock), under a name that lies in it; whoever holds the lock
may call back to work what that name left. Pools of other folders may share the catalog: each says that it runs, and
what one has in work that says so no more is taken over by the others.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.files import write_whole
from f2l_vllm.pool.lane import Lane, Work
from f2l_vllm.pool.messages import Event, WorkerInfo, WorkerSpec
from f2l_vllm.pool.worker import HypernetworkWorker
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import Store

logger = logging.getLogger(__name__)

NAMESPACE = "f2l"
_BEAT_SECONDS = 5.0  # between two signs of life
_LANE_SECONDS = 1.0  # for a lane whose actor was killed to notice
_OBJECT_STORE_BYTES = 100 * 2**20  # only small events pass through it


@dataclass(frozen=True)
class PoolConfig:
    """How many workers, what Ray reserves for each, and how many jobs each takes at a time."""

    workers: int
    cpus: float
    gpus: float
    ray_address: str | None
    job_attempts: int
    job_seconds: float
    batch: int = 1


class Pool:
    """Runs the workers of one data folder. `on_event` is called from lane threads with every event of a job."""

    def __init__(
        self,
        config: PoolConfig,
        spec: WorkerSpec,
        catalog: Catalog,
        store: Store,
        on_event: Callable[[Event], None] = lambda _event: None,
    ) -> None:
        self._config = config
        self._spec = spec
        self._catalog = catalog
        self._stopping = threading.Event()
        self.failed = threading.Event()  # workers cannot be started any more: begin again in a new process
        self._lock = FileLock(spec.home / "pool.lock", thread_local=False)
        work = Work(
            catalog,
            store,
            config.batch,
            config.job_seconds,
            config.job_attempts,
            self._new_actor,
            self.missing,
            on_event,
            self._stopping,
            self.failed,
        )
        self._lanes = [Lane(index, work) for index in range(config.workers)]

    def start(self, wait_seconds: float = 0.0) -> bool:
        """Take the data folder and start the lanes; False when another pool still has it after `wait_seconds`."""
        try:
            self._lock.acquire(timeout=wait_seconds)
        except Timeout:
            return False
        self._catalog.pool = _name(self._spec.home)
        self._beat()
        # Whoever had them did not stop in order, and one of them may be why: the attempt counts.
        if released := self._catalog.release_all_jobs(blameless=False):
            logger.info("%d interrupted jobs wait again", released)
        self._connect()
        for lane in self._lanes:
            lane.start()
        threading.Thread(target=self._beat_on, name="f2l-beat", daemon=True).start()
        return True

    def why(self) -> str:
        """What the workers that are not there wait for, or what went wrong when they were started."""
        return next((lane.why for lane in self._lanes if lane.info is None and lane.why), "")

    def workers(self) -> list[WorkerInfo]:
        """The workers that are loaded and alive."""
        return [lane.info for lane in self._lanes if lane.info is not None]

    def stop(self) -> None:
        """Stop lanes and actors, and the private Ray; jobs in work wait for the next start."""
        if not self._lock.is_locked:
            return
        self._stopping.set()
        for lane in self._lanes:
            lane.kill()
        for lane in self._lanes:
            lane.join(timeout=_LANE_SECONDS)
        try:
            self._catalog.release_all_jobs(blameless=True)
        except Unavailable as error:
            logger.warning("what was in work waits again at the next start, as an attempt: %s", error)
        ray.shutdown()
        self._lock.release()

    def _beat(self) -> None:
        if released := self._catalog.beat():
            logger.info("%d jobs of a pool that is gone wait again", released)

    def _beat_on(self) -> None:
        while not self._stopping.wait(_BEAT_SECONDS):
            try:
                self._beat()
            except Unavailable as error:
                logger.warning("this pool cannot say that it runs: %s", error)

    def _connect(self) -> None:
        config = self._config
        options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": False}
        if config.ray_address is None:
            # A private Ray offers what the workers ask for, even when they are more than this machine's cores.
            cpus = max(1, -(-config.workers * config.cpus // 1))
            options |= {
                "address": "local",
                "num_cpus": int(cpus),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        else:
            options["address"] = config.ray_address
        ray.init(**options)

    def missing(self) -> str | None:
        """What no node of the cluster has for a worker, or None."""
        needed = {"CPU": self._config.cpus, "GPU": self._config.gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in nodes):
            return None
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in needed.items() if amount)
        have = " and ".join(f"{max((node.get(name, 0) for node in nodes), default=0):g} {name}" for name in needed)
        return f"a worker needs {wanted}, and no node of the Ray cluster has as much (the most: {have})"

    def _new_actor(self) -> Any:
        actor: Any = ray.remote(HypernetworkWorker)
        reserved = {"num_cpus": self._config.cpus, "num_gpus": self._config.gpus}
        # A job runs in one of the threads, `cancel` in the other.
        return actor.options(**reserved, max_restarts=0, max_concurrency=2).remote(self._spec)


def _name(home: Path) -> str:
    """The name of the pool that serves this data folder. The folder's lock is held."""
    path = home / "pool.name"
    if not path.is_file() or not (name := path.read_text().strip()):
        name = uuid.uuid4().hex
        write_whole(path, name)
    return name
