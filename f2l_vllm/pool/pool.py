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
from pathlib import Path

from filelock import FileLock, Timeout

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.files import write_whole
from f2l_vllm.pool.actors import Actors
from f2l_vllm.pool.config import PoolConfig
from f2l_vllm.pool.lane import Lane, Work
from f2l_vllm.pool.messages import Event, WorkerInfo
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import Store

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0  # between two signs of life
_LANE_SECONDS = 1.0  # for a lane whose actor was killed to notice


class Pool:
    """Runs the workers of the store's data folder. `on_event` is called from lane threads with every event of a job."""

    def __init__(
        self,
        config: PoolConfig,
        actors: Actors,
        catalog: Catalog,
        store: Store,
        on_event: Callable[[Event], None] = lambda _event: None,
    ) -> None:
        self._actors = actors
        self._catalog = catalog
        self._home = store.home
        self._stopping = threading.Event()
        self.failed = threading.Event()  # workers cannot be started any more: begin again in a new process
        self._lock = FileLock(store.home / "pool.lock", thread_local=False)
        work = Work(
            catalog,
            store,
            config.batch,
            config.job_seconds,
            config.job_attempts,
            actors.new,
            actors.missing,
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
        self._catalog.pool = _name(self._home)
        self._beat()
        # Whoever had them did not stop in order, and one of them may be why: the attempt counts.
        if released := self._catalog.release_all_jobs(blameless=False):
            logger.info("%d interrupted jobs wait again", released)
        self._actors.connect()
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
        if self._lock.is_locked:
            self._stopping.set()
            for lane in self._lanes:
                lane.kill()
            for lane in self._lanes:
                lane.join(timeout=_LANE_SECONDS)
            try:
                self._catalog.release_all_jobs(blameless=True)
            except Unavailable as error:
                logger.warning("what was in work waits again at the next start, as an attempt: %s", error)
        self._actors.disconnect()
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


def _name(home: Path) -> str:
    """The name of the pool that serves this data folder. The folder's lock is held."""
    path = home / "pool.name"
    if not path.is_file() or not (name := path.read_text().strip()):
        name = uuid.uuid4().hex
        write_whole(path, name)
    return name
