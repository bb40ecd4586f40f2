"""A lane: the thread that feeds one Ray actor with jobs from the catalog.

It claims a job, runs it on its actor, writes what happens into the catalog, and takes the next job. A job stays in the
catalog until it ends, so no job is lost with an actor: when an actor dies, its lane puts the job back and starts a new
actor.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.jobs import EXHAUSTED
from f2l_vllm.catalog.listener import Listener
from f2l_vllm.catalog.notices import JOBS, JOBS_SECONDS
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Job
from f2l_vllm.catalog.tombstones import LOST
from f2l_vllm.pool.messages import Cancelled, Event, Failed, Outcome, Progress, WorkerInfo
from f2l_vllm.pool.trail import Trail
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import Store

logger = logging.getLogger(__name__)

_PATH = re.compile(r"(?<![\w.])/[^\s'\",:;)]+")
_LONGEST_REASON = 300
_IDLE_SECONDS = 0.05
_REST_SECONDS = 1.0  # instead, while notices of jobs arrive; one may get lost
# After a notice or a job a lane does not rest yet: the notice may stand for jobs that are still to come, and another
# lane may have been about to take the very job that this one saw.
_LIVELY_SECONDS = 2 * JOBS_SECONDS
_CANCEL_SECONDS = 0.5  # between two checks whether a running job is still wanted
_CANCELLED_SECONDS = 30.0  # a worker that has not given up a cancelled job by then is replaced
_CHECK_SECONDS = 1.0
_START_SECONDS = 600.0
_PLACE_SECONDS = 1.0  # between two checks whether a worker can be placed
_FAILED_STARTS = 3
_RESTART_SECONDS = 2.0
_UNAVAILABLE_SECONDS = 5.0


@dataclass(frozen=True)
class Work:
    """What the lanes of a pool share.

    Attributes:
        batch: how many jobs a lane takes at a time.
        job_seconds, job_attempts: how long one job may take on a worker, and how many attempts it gets.
        new_actor: starts a worker.
        missing: which resources of a worker no node has, or None.
        on_event: called with every event of a job.
        stopping: set when the pool stops, and the actors are killed.
        failed: a lane sets it when workers can no longer be started.
        listener: hears of jobs.
        keeps: whether what was fetched and made stays in a data folder that is a cache.
        finishing: set when no more jobs are to be taken; those in work go on.
        lanes: how many there are.
        looks_ahead: whether a worker decodes the next video while it reads another.
        ahead: lane -> the video that its worker decodes ahead.
    """

    catalog: Catalog
    store: Store
    batch: int
    job_seconds: float
    job_attempts: int
    new_actor: Callable[[], Any]
    missing: Callable[[], str | None]
    on_event: Callable[[Event], None]
    stopping: threading.Event
    failed: threading.Event
    listener: Listener | None = None
    keeps: bool = True
    finishing: threading.Event = field(default_factory=threading.Event)
    lanes: int = 1
    looks_ahead: bool = True
    ahead: dict[int, str] = field(default_factory=dict)


class Lane(threading.Thread):
    """Feeds one worker. `info` is set while its actor is loaded and alive.

    Args:
        work: what all lanes of a pool share.
    """

    def __init__(self, index: int, work: Work) -> None:
        super().__init__(name=f"f2l-lane-{index}", daemon=True)
        self._index = index
        self._work = work
        self._catalog = work.catalog
        self._actor: Any = None  # a Ray actor handle
        self._checked = 0.0
        self._failed_starts = 0
        self._woken = threading.Event()
        self._lively_until = 0.0
        if work.listener is not None:
            work.listener.on(JOBS, self.wake)
        self._trail = Trail()
        self.info: WorkerInfo | None = None
        self.why = ""

    def wake(self) -> None:
        """Have it look for jobs, or notice that the pool stops, at once."""
        self._lively_until = time.monotonic() + _LIVELY_SECONDS
        self._woken.set()

    def kill(self) -> None:
        """End the actor at once, whatever it is doing."""
        if self._actor is not None:
            ray.kill(self._actor)

    def run(self) -> None:
        while not (self._stopping() or self._work.finishing.is_set()):
            jobs: dict[str, Job] = {}
            try:
                self._ensure_actor()
                self._woken.clear()
                ahead, lanes = self._work.ahead.get(self._index), self._work.lanes
                claimed = self._catalog.claim_jobs(self._work.batch, ahead=ahead, among=lanes)
                jobs = {job.object: job for job in claimed}
                if ahead is not None and ahead not in {job.video for job in claimed}:
                    self._drop_ahead()
                if jobs:
                    self._work.ahead.pop(self._index, None)
                    self._run(jobs)
                    self.wake()
                elif not self._stopping():
                    self._woken.wait(self._idle_seconds())
            except Unavailable as error:  # the worker is idle and stays
                logger.warning("the catalog cannot be asked for jobs: %s", error)
                self._work.stopping.wait(_RESTART_SECONDS)
            except Exception:
                # A lane survives whatever goes wrong around a job, for example a restart of Ray.
                if not self._stopping():
                    logger.exception("a hypernetwork lane failed and goes on")
                    self._lose_actor("is replaced")  # it may still be running the job
                    self._give_back(jobs, blameless=False)
                    self._work.stopping.wait(_RESTART_SECONDS)

    def _idle_seconds(self) -> float:
        listener = self._work.listener
        may_rest = listener is not None and listener.is_heard and time.monotonic() > self._lively_until
        return _REST_SECONDS if may_rest else _IDLE_SECONDS

    def _give_back(self, jobs: dict[str, Job], *, blameless: bool) -> None:
        for job in jobs.values():
            self._enter(self._catalog.release_job, job, blameless=blameless)

    def _enter(self, method: Callable[..., Any], job: Job, *args: Any, **values: Any) -> Any:
        """Enter what became of an attempt, and try again while the catalog is busy, full or away."""
        self._forget(job)
        while True:
            try:
                return method(job.adapter_name, *args, token=job.token, **values)
            except Unavailable as error:
                logger.warning("what became of %s cannot be entered yet: %s", job.object, error)
            if self._work.stopping.wait(_RESTART_SECONDS):
                return None  # the next start finds the job running and lets it wait again

    def _forget(self, job: Job) -> None:
        """Drop bytes that were deleted while the worker fetched them, or all that the job has left here."""
        try:
            if not self._work.keeps:
                self._work.store.forget_adapter(job.object)
            if not self._work.keeps or not self._catalog.named([job.video]):
                self._work.store.forget_video(job.video)
        except Unavailable as error:
            logger.warning("%s is not dropped here yet: %s", job.video, error)

    def _stopping(self) -> bool:
        return self._work.stopping.is_set()

    def _ensure_actor(self) -> None:
        """Make sure the actor is alive, so that a worker that died while idle costs no job an attempt."""
        if self._actor is not None and time.monotonic() - self._checked < _CHECK_SECONDS:
            return
        if self._actor is not None:
            try:
                ray.get(self._actor.info.remote(), timeout=30)
                self._checked = time.monotonic()
                return
            except (RayActorError, GetTimeoutError):
                self._lose_actor("died while idle")
        self._actor = self._work.new_actor()
        try:
            self.info = self._loaded(self._actor.info.remote())
        except BaseException as error:
            self._lose_actor("did not start")
            self.why = f"a worker did not start and is tried again: {_without_paths(error)}"
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                self._work.failed.set()
            raise
        self._failed_starts = 0
        self._checked = time.monotonic()
        logger.info("hypernetwork worker ready: pid %d on %s, %s", self.info.pid, self.info.node, self.info.device)

    def _loaded(self, info: Any) -> WorkerInfo:
        """Wait until a new worker has loaded. In a cluster that is too small, wait for another node without limit."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            ready, _ = ray.wait([info], timeout=_PLACE_SECONDS)
            if ready:
                found: WorkerInfo = ray.get(info)
                return found
            missing = self._work.missing()
            self.why = missing or "a worker loads model and hypernetwork"
            if missing is not None:
                deadline = time.monotonic() + _START_SECONDS
            elif time.monotonic() > deadline:
                raise GetTimeoutError(f"it was not ready within {_START_SECONDS:.0f} s")

    def _lose_actor(self, what: str) -> None:
        if not self._stopping():
            logger.warning("hypernetwork worker %s %s", self.info.pid if self.info else "", what)
        self.info = None
        self._work.ahead.pop(self._index, None)
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _run(self, jobs: dict[str, Job]) -> None:
        """Run jobs together on the actor. Each job leaves `jobs` when it has ended or waits again."""
        self._end_poisonous(jobs)
        if not jobs:
            return
        try:
            for name, event in self._events(jobs):
                self._work.on_event(event)
                self._trail.note(jobs[name], event)
                if isinstance(event, Progress):
                    self._show(jobs[name], event)
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
                self._work.stopping.wait(_UNAVAILABLE_SECONDS)
            elif isinstance(error, RayActorError):
                self._lose_actor(f"died over {names}")
            elif isinstance(error, GetTimeoutError):
                self._lose_actor(f"took too long over {names}")
            else:
                # A process that failed once, for lack of memory or from a broken device, may fail for every video.
                logger.exception("an attempt at %s failed", names)
                self._lose_actor("is replaced")
                self._work.stopping.wait(_RESTART_SECONDS)
            for name in list(jobs):
                self._fail_attempt(jobs.pop(name), error)
        finally:
            self._trail.end()

    def _look_ahead(self) -> None:
        """Have the worker decode the video that this lane will probably claim next, or drop one that was deleted."""
        work = self._work
        try:
            if (ahead := work.ahead.get(self._index)) is not None:
                if not self._catalog.named([ahead]):
                    self._drop_ahead()
                return
            if not work.looks_ahead or work.finishing.is_set():
                return
            of_others = set(work.ahead.values())
            video = next((one for one in self._catalog.next_videos(work.lanes) if one not in of_others), None)
        except Unavailable:
            return
        if video is not None:
            work.ahead[self._index] = video
            self._actor.look_ahead.remote(video)

    def _drop_ahead(self) -> None:
        self._work.ahead.pop(self._index, None)
        self._actor.look_ahead.remote(None)

    def _show(self, job: Job, progress: Progress) -> None:
        try:
            self._catalog.advance(job.adapter_name, progress.state, progress.fraction, token=job.token)
        except Unavailable as error:
            logger.warning("the progress of %s is not shown: %s", job.object, error)

    def _events(self, jobs: dict[str, Job]) -> Iterator[tuple[str, Event]]:
        """The actor's events as they happen, until the last job has ended."""
        assert self._actor is not None
        seconds = self._work.job_seconds * len(jobs)
        deadline = time.monotonic() + seconds
        method = self._actor.internalize.options(num_returns="streaming")
        events = method.remote([(job.object, job.video) for job in jobs.values()])
        cancelled: set[str] = set()
        reads = False
        looked = time.monotonic()
        while jobs:
            ready, _ = ray.wait([events], timeout=max(0.0, min(_CANCEL_SECONDS, deadline - time.monotonic())))
            if ready:
                name, event = ray.get(next(events))
                yield name, event
                if not reads and isinstance(event, Progress) and event.state is VideoState.ENCODING:
                    reads = True  # so its decoder is free
                    self._look_ahead()
            elif time.monotonic() >= deadline:
                raise GetTimeoutError(f"no result within {seconds:.0f} s")
            if time.monotonic() - looked < _CANCEL_SECONDS:
                continue
            looked = time.monotonic()
            if reads:
                self._look_ahead()
            for name in jobs.keys() - cancelled:
                if not self._wanted(jobs[name]):
                    logger.info("%s is given up: its files were deleted, or another attempt at it has begun", name)
                    self._actor.cancel.remote(name)
                    cancelled.add(name)
            if cancelled >= jobs.keys():
                deadline = min(deadline, time.monotonic() + _CANCELLED_SECONDS)

    def _end_poisonous(self, jobs: dict[str, Job]) -> None:
        """End the jobs that have used all their attempts and whose last attempt ended the whole pool."""
        limit = self._work.job_attempts
        for name in [name for name, job in jobs.items() if job.attempts > limit]:
            outcome = _exhausted(limit, "the whole pool")
            self._work.on_event(outcome)
            self._end(jobs.pop(name), outcome)

    def _end(self, job: Job, outcome: Outcome) -> None:
        catalog = self._catalog
        if isinstance(outcome, Cancelled):
            self._enter(catalog.release_job, job, blameless=True)  # deletes the job if still nobody waits for it
            return
        if isinstance(outcome, Failed):
            # Missing bytes may have been deleted and uploaded again meanwhile, as another copy.
            generation = job.generation if outcome.code == LOST else None
            self._enter(catalog.fail_job, job, outcome.code, outcome.message, generation=generation)
            return
        entered = self._enter(catalog.finish_job, job, rank=outcome.rank, size=outcome.bytes, info=outcome.info)
        if entered is None and not self._stopping():
            logger.info("%s is refused and removed: its files were deleted, or its attempt was given up", job.object)
            try:
                self._work.store.remove_adapter(job.object)
            except Unavailable as error:
                logger.warning("%s, which nobody waits for any more, is removed later: %s", job.object, error)

    def _wanted(self, job: Job) -> bool:
        """Whether anybody waits for what this attempt makes. True while the catalog is unavailable, so that the job is
        not given up for that."""
        try:
            return self._catalog.wanted(job.adapter_name, token=job.token)
        except Unavailable:
            return True

    def _fail_attempt(self, job: Job, error: RayError) -> None:
        """Let the job wait again, or end it if it has used all its attempts."""
        limit = self._work.job_attempts
        if job.attempts < limit:
            self._enter(self._catalog.release_job, job)
            return
        cause = getattr(error, "cause", None) or error
        reason = (str(cause).splitlines() or [""])[0]
        outcome = _exhausted(limit, f"{type(cause).__name__}: {reason}")
        self._work.on_event(outcome)
        self._end(job, outcome)


def _exhausted(attempts: int, how: str) -> Failed:
    return Failed(
        EXHAUSTED, f"the video could not be internalized in {attempts} attempts; the last one ended with {how}"
    )


def _without_paths(error: BaseException) -> str:
    """The last line of an error, which names its cause, without paths: clients must not learn this machine's paths."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"
    return _PATH.sub("…", text)[:_LONGEST_REASON]
