"""The pool: N Ray actors, and one lane (a thread) for each that feeds it jobs from the catalog.

A lane claims a job, runs it on its actor, writes what happens into the catalog, and takes the next. A job stays in
the catalog until it ends, so nothing is lost with an actor: when one dies, its lane puts the job back and starts a new
actor. Only one pool serves a data folder at a time (a file lock), under a name that lies in it; whoever holds the lock
may call back to work what that name left. Pools of other folders may share the catalog: each says that it runs, and
what one has in work that says so no more is taken over by the others.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.jobs import EXHAUSTED
from f2l_vllm.catalog.tables import Job
from f2l_vllm.catalog.tombstones import LOST
from f2l_vllm.files import write_whole
from f2l_vllm.pool.messages import Cancelled, Event, Failed, Outcome, Progress, WorkerInfo, WorkerSpec
from f2l_vllm.pool.worker import HypernetworkWorker
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import Store

logger = logging.getLogger(__name__)

NAMESPACE = "f2l"
_PATH = re.compile(r"(?<![\w.])/[^\s'\",:;)]+")
_LONGEST_REASON = 300
_IDLE_SECONDS = 0.05
_CANCEL_SECONDS = 0.5  # between looks at whether a job in work is still wanted
_CANCELLED_SECONDS = 30.0  # a worker that does not give a job up by then is replaced
_CHECK_SECONDS = 1.0
_START_SECONDS = 600.0
_PLACE_SECONDS = 1.0  # between two looks at whether a worker can be placed
_FAILED_STARTS = 3
_RESTART_SECONDS = 2.0
_UNAVAILABLE_SECONDS = 5.0
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
        self._store = store
        self._on_event = on_event
        self._stopping = threading.Event()
        self.failed = threading.Event()  # workers cannot be started any more: begin again in a new process
        self._lock = FileLock(spec.home / "pool.lock", thread_local=False)
        self._lanes = [_Lane(index, self) for index in range(config.workers)]

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


class _Lane(threading.Thread):
    """One worker's feeder. `info` is set while its actor is loaded and alive."""

    def __init__(self, index: int, pool: Pool) -> None:
        super().__init__(name=f"f2l-lane-{index}", daemon=True)
        self._pool = pool
        self._actor: Any = None  # a Ray actor handle
        self._checked = 0.0
        self._failed_starts = 0
        self.info: WorkerInfo | None = None
        self.why = ""

    def kill(self) -> None:
        """End the actor at once, whatever it does."""
        if self._actor is not None:
            ray.kill(self._actor)

    def run(self) -> None:
        while not self._stopping():
            jobs: dict[str, Job] = {}
            try:
                self._ensure_actor()
                jobs = {job.adapter_name: job for job in self._pool._catalog.claim_jobs(self._pool._config.batch)}
                if jobs:
                    self._run(jobs)
                else:
                    self._pool._stopping.wait(_IDLE_SECONDS)
            except Unavailable as error:  # there may be jobs; the worker is at none and stays
                logger.warning("the catalog cannot be asked for jobs: %s", error)
                self._pool._stopping.wait(_RESTART_SECONDS)
            except Exception:
                # A lane outlives whatever goes wrong around a job, Ray restarting for one.
                if not self._stopping():
                    logger.exception("a hypernetwork lane failed and goes on")
                    self._lose_actor("is replaced")  # it may still be at the job
                    self._give_back(jobs, blameless=False)
                    self._pool._stopping.wait(_RESTART_SECONDS)

    def _give_back(self, jobs: dict[str, Job], *, blameless: bool) -> None:
        for name in jobs:
            self._enter(self._pool._catalog.release_job, name, blameless=blameless)

    def _enter(self, method: Callable[..., Any], name: str, *args: Any, **values: Any) -> None:
        """Have a catalog that is busy, full or away enter what became of a job as soon as it can."""
        while True:
            try:
                method(name, *args, **values)
                return
            except Unavailable as error:
                logger.warning("what became of %s cannot be entered yet: %s", name, error)
            if self._pool._stopping.wait(_RESTART_SECONDS):
                return  # the next start finds the job in work and lets it wait again

    def _stopping(self) -> bool:
        return self._pool._stopping.is_set()

    def _ensure_actor(self) -> None:
        """A live actor, so that a worker that died while idle costs no job an attempt."""
        if self._actor is not None and time.monotonic() - self._checked < _CHECK_SECONDS:
            return
        if self._actor is not None:
            try:
                ray.get(self._actor.info.remote(), timeout=30)
                self._checked = time.monotonic()
                return
            except (RayActorError, GetTimeoutError):
                self._lose_actor("died while idle")
        self._actor = self._pool._new_actor()
        try:
            self.info = self._loaded(self._actor.info.remote())
        except BaseException as error:
            self._lose_actor("did not start")
            self.why = f"a worker did not start and is tried again: {_without_paths(error)}"
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                self._pool.failed.set()
            raise
        self._failed_starts = 0
        self._checked = time.monotonic()
        logger.info("hypernetwork worker ready: pid %d on %s, %s", self.info.pid, self.info.node, self.info.device)

    def _loaded(self, info: Any) -> WorkerInfo:
        """Wait for a new worker to have loaded. In a cluster that is too small it waits for another node, for ever."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            ready, _ = ray.wait([info], timeout=_PLACE_SECONDS)
            if ready:
                found: WorkerInfo = ray.get(info)
                return found
            missing = self._pool.missing()
            self.why = missing or "a worker loads model and hypernetwork"
            if missing is not None:
                deadline = time.monotonic() + _START_SECONDS
            elif time.monotonic() > deadline:
                raise GetTimeoutError(f"it was not ready within {_START_SECONDS:.0f} s")

    def _lose_actor(self, what: str) -> None:
        if not self._stopping():
            logger.warning("hypernetwork worker %s %s", self.info.pid if self.info else "", what)
        self.info = None
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _run(self, jobs: dict[str, Job]) -> None:
        """Run jobs on the actor together; each is taken out of `jobs` when it has ended or waits again."""
        self._end_poisonous(jobs)
        if not jobs:
            return
        try:
            for name, event in self._events(jobs):
                self._pool._on_event(event)
                if isinstance(event, Progress):
                    self._show(name, event)
                else:
                    self._end(jobs.pop(name), event)
        except RayError as error:
            if self._stopping():
                return
            names = ", ".join(jobs)
            if isinstance(cause := getattr(error, "cause", None), Unavailable):
                logger.warning("%s wait for the store: %s", names, cause)
                self._give_back(jobs, blameless=True)
                jobs.clear()
                self._pool._stopping.wait(_UNAVAILABLE_SECONDS)
            elif isinstance(error, RayActorError):
                self._lose_actor(f"died over {names}")
            elif isinstance(error, GetTimeoutError):
                self._lose_actor(f"took too long over {names}")
            else:
                # A process that failed once, out of memory or with a broken device, may fail for every video.
                logger.exception("an attempt at %s failed", names)
                self._lose_actor("is replaced")
                self._pool._stopping.wait(_RESTART_SECONDS)
            for name in list(jobs):
                self._fail_attempt(jobs.pop(name), error)

    def _show(self, name: str, progress: Progress) -> None:
        try:
            self._pool._catalog.advance(name, progress.state, progress.fraction)
        except Unavailable as error:
            logger.warning("the progress of %s is not shown: %s", name, error)

    def _events(self, jobs: dict[str, Job]) -> Iterator[tuple[str, Event]]:
        """What the actor says of the jobs, as it happens, until the last has ended."""
        assert self._actor is not None
        seconds = self._pool._config.job_seconds * len(jobs)
        deadline = time.monotonic() + seconds
        method = self._actor.internalize.options(num_returns="streaming")
        events = method.remote([(job.adapter_name, job.video) for job in jobs.values()])
        cancelled: set[str] = set()
        looked = time.monotonic()
        while jobs:
            ready, _ = ray.wait([events], timeout=max(0.0, min(_CANCEL_SECONDS, deadline - time.monotonic())))
            if ready:
                yield ray.get(next(events))
            elif time.monotonic() >= deadline:
                raise GetTimeoutError(f"no result within {seconds:.0f} s")
            if time.monotonic() - looked < _CANCEL_SECONDS:
                continue
            looked = time.monotonic()
            for name in jobs.keys() - cancelled:
                if not self._wanted(name):
                    logger.info("%s is given up: every file that waited for it was deleted", name)
                    self._actor.cancel.remote(name)
                    cancelled.add(name)
            if cancelled >= jobs.keys():
                deadline = min(deadline, time.monotonic() + _CANCELLED_SECONDS)

    def _end_poisonous(self, jobs: dict[str, Job]) -> None:
        """Jobs that have cost all their attempts, the last one the whole pool, are not tried again."""
        limit = self._pool._config.job_attempts
        for name in [name for name, job in jobs.items() if job.attempts > limit]:
            outcome = _exhausted(limit, "the whole pool")
            self._pool._on_event(outcome)
            self._end(jobs.pop(name), outcome)

    def _end(self, job: Job, outcome: Outcome) -> None:
        catalog, name = self._pool._catalog, job.adapter_name
        if isinstance(outcome, Cancelled):
            self._enter(catalog.release_job, name, blameless=True)  # or not at all, if nobody waits for it still
            return
        if isinstance(outcome, Failed):
            # Bytes that are not there may have been deleted and uploaded again meanwhile, as another copy.
            generation = job.generation if outcome.code == LOST else None
            self._enter(catalog.fail_job, name, outcome.code, outcome.message, generation=generation)
            return
        self._enter(catalog.finish_job, name, rank=outcome.rank, size=outcome.bytes, info=outcome.info)
        if not self._wanted(name):  # every file was deleted meanwhile
            try:
                self._pool._store.remove_adapter(name)
            except Unavailable as error:
                logger.warning("%s, which nobody waits for any more, is removed later: %s", name, error)

    def _wanted(self, name: str) -> bool:
        """Whether anybody waits for this adapter, or it is published; a catalog that cannot say so is no reason to
        give it up."""
        try:
            return self._pool._catalog.wanted(name)
        except Unavailable:
            return True

    def _fail_attempt(self, job: Job, error: RayError) -> None:
        """The job waits again, or ends when it has cost too many workers."""
        limit = self._pool._config.job_attempts
        if job.attempts < limit:
            self._enter(self._pool._catalog.release_job, job.adapter_name)
            return
        cause = getattr(error, "cause", None) or error
        reason = (str(cause).splitlines() or [""])[0]
        outcome = _exhausted(limit, f"{type(cause).__name__}: {reason}")
        self._pool._on_event(outcome)
        self._end(job, outcome)


def _exhausted(attempts: int, how: str) -> Failed:
    return Failed(
        EXHAUSTED, f"the video could not be internalized in {attempts} attempts; the last one ended with {how}"
    )


def _without_paths(error: BaseException) -> str:
    """The last line of an error, which names its cause, for clients: they learn no paths of this machine's."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"
    return _PATH.sub("…", text)[:_LONGEST_REASON]


def _name(home: Path) -> str:
    """The name of the pool that serves this data folder. The folder's lock is held."""
    path = home / "pool.name"
    if not path.is_file() or not (name := path.read_text().strip()):
        name = uuid.uuid4().hex
        write_whole(path, name)
    return name
