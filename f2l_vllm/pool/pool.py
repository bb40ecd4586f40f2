"""The pool: N Ray actors, each with a lane that feeds it jobs from the catalog.

A file lock lets only one pool serve a data folder at a time. The pool's name is stored in the folder, so the holder of
the lock may put back the jobs that an earlier pool of that name left. Pools of other folders may share the catalog.
Each gives signs of life, and when one falls silent, the others take over its jobs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from f2l_vllm import tracing
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import Listener, listen
from f2l_vllm.files import lasting_name
from f2l_vllm.pool.actors import Actors
from f2l_vllm.pool.config import PoolConfig
from f2l_vllm.pool.lane import Lane, Work
from f2l_vllm.pool.messages import Event, WorkerInfo
from f2l_vllm.settings import Settings
from f2l_vllm.store.address import ADAPTER_PREFIX
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import Store

logger = logging.getLogger(__name__)

_BUSY_SECONDS = 60.0  # long: no client waits here, and a result that cannot be entered is lost work
_BEAT_SECONDS = 5.0  # between two signs of life
_OTHERS = "the servers have another model, hypernetwork or way of reading videos than these workers, which make nothing"
_LANE_SECONDS = 1.0  # how long `stop` waits for a lane to notice that its actor was killed


class Pool:
    """Runs the workers of the store's data folder. Lane threads call `on_event` with every event of a job; `listener`
    is None when the catalog sends no notices."""

    def __init__(
        self,
        config: PoolConfig,
        actors: Actors,
        catalog: Catalog,
        store: Store,
        on_event: Callable[[Event], None] = lambda _event: None,
        listener: Listener | None = None,
    ) -> None:
        self._actors = actors
        self._catalog = catalog
        self._store, self._home = store, store.home
        self._keeps = config.keeps
        self._stopping = threading.Event()
        self.failed = threading.Event()  # workers can no longer be started: start over in a new process
        self.is_needed = True  # whether the servers that answer have this pool's models
        self._lock = FileLock(store.home / "pool.lock", thread_local=False)
        work = self._work = Work(
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
            listener,
            config.keeps,
            lanes=config.workers,
            looks_ahead=config.looks_ahead,
        )
        self._lanes = [Lane(index, work) for index in range(config.workers)]

    def start(self, wait_seconds: float = 0.0) -> bool:
        """Lock the data folder and start the lanes; False if another pool still holds it after `wait_seconds`."""
        try:
            self._lock.acquire(timeout=wait_seconds)
        except Timeout:
            return False
        self._catalog.pool = lasting_name(self._home / "pool.name")
        self._beat()
        # The pool that ran these jobs did not stop in order. One of them may be the cause, so the attempt counts.
        if released := self._catalog.release_all_jobs(blameless=False):
            logger.info("%d interrupted jobs wait again", released)
        self._forget()
        self._actors.connect()
        for lane in self._lanes:
            lane.start()
        threading.Thread(target=self._beat_on, name="f2l-beat", daemon=True).start()
        return True

    def why(self) -> str:
        """What the missing workers wait for, what went wrong when they were started, or why they make nothing."""
        if not self.is_needed:
            return _OTHERS
        return next((lane.why for lane in self._lanes if lane.info is None and lane.why), "")

    def workers(self) -> list[WorkerInfo]:
        """The workers that are loaded and alive."""
        return [lane.info for lane in self._lanes if lane.info is not None]

    def finish(self, seconds: float) -> None:
        """Take no more jobs, and wait at most so long for those in work; `stop` comes next."""
        self._work.finishing.set()
        deadline = time.monotonic() + seconds
        for lane in self._lanes:
            lane.wake()
        for lane in self._lanes:
            if lane.info is not None:  # else it has no job
                lane.join(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Stop the lanes, the actors and, unless a lane is late, the private Ray. Running jobs wait for the next
        start."""
        if self._lock.is_locked:
            self._stopping.set()
            for lane in self._lanes:
                lane.wake()
                lane.kill()
            for lane in self._lanes:
                lane.join(timeout=_LANE_SECONDS)
            try:
                self._forget()
                self._catalog.release_all_jobs(blameless=True)
            except Unavailable as error:
                logger.warning("what was in work waits again at the next start, as an attempt: %s", error)
        if not any(lane.is_alive() for lane in self._lanes):
            self._actors.disconnect()
        # Else Ray ends with this process, and not before: it would end the process at once, in the middle of this,
        # when a thread is in it while it shuts down.
        self._lock.release()

    def _forget(self) -> None:
        """Drop what jobs have left here, unless it is kept."""
        if not self._keeps:
            forget_all(self._store)

    def _beat(self) -> None:
        if released := self._catalog.beat():
            logger.info("%d jobs of a pool that is gone wait again", released)
        present, _ = self._catalog.revisions()
        is_needed = None in (present, self._catalog.revision) or present == self._catalog.revision
        if self.is_needed and not is_needed:
            logger.warning(_OTHERS)
        self.is_needed = is_needed

    def _beat_on(self) -> None:
        while not self._stopping.wait(_BEAT_SECONDS):
            try:
                self._beat()
            except Unavailable as error:
                logger.warning("this pool cannot say that it runs: %s", error)


def forget_all(store: Store) -> None:
    """Empty a data folder that is a cache."""
    for name in store.kept():
        (store.forget_adapter if name.startswith(ADAPTER_PREFIX) else store.forget_video)(name)


@contextmanager
def open_pool(
    settings: Settings,
    config: PoolConfig,
    actors: Actors,
    home: Path,
    revision: str,
    on_event: Callable[[Event], None],
) -> Iterator[Pool]:
    """A pool on this data folder with a catalog, store and listener of its own, not started yet. In the end it is
    stopped.

    Args:
        revision: identifies models and sampling. The pool makes adapters while files are answered with this revision.

    Raises:
        Unavailable: catalog or store cannot be opened.
    """
    tracing.start("pool")
    catalog = Catalog(settings.catalog_url, busy_seconds=_BUSY_SECONDS)
    catalog.revision = revision
    hot_bytes = settings.hot_bytes if config.keeps else 0
    store = open_store(home, url=settings.store, hot_bytes=hot_bytes, reserve_bytes=settings.reserve_bytes)
    listener = listen(catalog, settings.listen_url)
    pool = Pool(config, actors, catalog, store, on_event, listener)
    try:
        yield pool
    finally:
        pool.stop()
        if listener is not None:
            listener.close()
        catalog.close()
