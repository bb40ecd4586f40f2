"""Steps within one transaction of the catalog, shared by its modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, Connection, and_, bindparam, delete, exists, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from f2l_vllm.catalog.database import SPARE, Queue, moment
from f2l_vllm.catalog.states import GONE, IN_WORK, LIVE, VideoState, check_transition
from f2l_vllm.catalog.tables import (
    ADAPTER,
    LATE,
    AdapterRecord,
    FileRecord,
    Tombstone,
    adapters,
    files,
    jobs,
    parts,
    serving,
    usage,
)
from f2l_vllm.catalog.tombstones import doom, doom_video_unless_named
from f2l_vllm.store.errors import AdapterIdsExhausted, CatalogBusy, OtherModels

EXHAUSTED = "internalization_failed"  # the error of a video that cost a worker in each of its attempts
# Engines keep LoRA int ids in int32 tensors, and a server leaves the first 2^20 to the operator's own adapters.
LAST_ID = 2**31 - 1 - 2**20

PRESENT = select(serving.c.revision)  # None: no server has ever answered
# Every upload runs these statements. They are built once: building a statement takes longer than running it.
_IN_LINE = and_(jobs.c.running == 0, jobs.c.background.is_(False))
_WAITING = select(func.count()).select_from(jobs).where(_IN_LINE)
_THEIRS = (
    select(func.count(jobs.c.id.distinct()))
    .join(files, files.c.adapter_name == jobs.c.adapter_name)
    .where(_IN_LINE, files.c.tenant == bindparam("tenant"), files.c.state.in_(IN_WORK))
)
_NAME: BindParameter[str] = bindparam("name")
_STANDING = select(
    exists().where(adapters.c.name == _NAME),
    select(jobs.c.background).where(jobs.c.adapter_name == _NAME).scalar_subquery(),  # None: there is no job
    exists().where(files.c.adapter_name == _NAME, files.c.error_code == EXHAUSTED),
    _WAITING.scalar_subquery(),
    PRESENT.scalar_subquery(),
)
_JOB = tuple(
    jobs.c[name] for name in ("adapter_name", "sha256", "running", "attempts", "background", "created_at", "trace")
)
_NEW_JOB = select(*(bindparam(column.name, type_=column.type) for column in _JOB))
_ROOM = _WAITING.scalar_subquery() < bindparam("queue_limit")
_SHARE = _THEIRS.scalar_subquery() < bindparam("tenant_limit")
_ENTER_JOB = insert(jobs)
_ENTER_IN_ROOM = insert(jobs).from_select(_JOB, _NEW_JOB.where(_ROOM)).returning(jobs.c.id)
_ENTER_IN_SHARE = insert(jobs).from_select(_JOB, _NEW_JOB.where(_ROOM, _SHARE)).returning(jobs.c.id)
_COUNT = {
    name: kind.insert(usage)
    .on_conflict_do_update(index_elements=[usage.c.tenant], set_={"bytes": usage.c.bytes + bindparam("more")})
    .returning(usage.c.bytes)
    for name, kind in (("sqlite", sqlite), ("postgresql", postgresql))
}
# The queue is held once the tenant's count is, and the next statement sees the jobs of those who held it before.
_COUNT_AND_HOLD = {queue: {**_COUNT, "postgresql": _COUNT["postgresql"].returning(queue.value)} for queue in Queue}


class QueueFull(RuntimeError):
    """There is no room for another job; `retry_after` is a guess in seconds."""

    def __init__(self, queued: int, retry_after: int) -> None:
        super().__init__(f"{queued} videos are waiting to be internalized already")
        self.retry_after = retry_after


class QuotaExceeded(RuntimeError):
    """The upload would take the tenant over its limit of bytes."""


def file_record(row: Sequence[Any]) -> FileRecord:
    """A row of `files`, its columns in the table's order."""
    values = dict(zip(files.c.keys(), row, strict=True))
    return FileRecord(**{**values, "state": VideoState(values["state"])})


def adapter_record(row: Sequence[Any]) -> AdapterRecord:
    """A row of `adapters`, its columns in the table's order."""
    return AdapterRecord(**dict(zip(adapters.c.keys(), row, strict=True)))


def file_of(connection: Connection, file_id: str, tenant: str, *, hold: bool = False) -> FileRecord | None:
    """A tenant's file in any state, or None. With `hold`, nobody changes it before this transaction ends."""
    query = select(files).where(files.c.id == file_id, files.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if hold else query).first()
    return None if row is None else file_record(row)


def file_of_address(connection: Connection, tenant: str, sha256: str) -> FileRecord | None:
    """A tenant's live file with these bytes that was named by an address, or None."""
    named = and_(files.c.from_address.is_(True), files.c.state.in_(LIVE))
    row = connection.execute(select(files).where(files.c.tenant == tenant, files.c.sha256 == sha256, named)).first()
    return None if row is None else file_record(row)


def adapter_of(connection: Connection, name: str) -> AdapterRecord | None:
    """The adapter of this name, or None."""
    row = connection.execute(select(adapters).where(adapters.c.name == name)).first()
    return None if row is None else adapter_record(row)


def files_of(connection: Connection, adapter_name: str, *, hold: bool = False) -> list[FileRecord]:
    """Every live file that answers from this adapter, waits for it, or failed with it. With `hold`, nobody changes one
    of them before this transaction ends."""
    query = select(files).where(files.c.adapter_name == adapter_name, files.c.state.in_(LIVE))
    query = query.order_by(files.c.id).with_for_update() if hold else query
    return [file_record(row) for row in connection.execute(query)]


def move(connection: Connection, records: Collection[FileRecord], state: VideoState, **values: Any) -> None:
    """Move files to another state; no other code does. A file that another transaction has moved meanwhile stays there.

    Raises:
        IllegalTransition: the state machine has no such transition.
    """
    for record in records:
        check_transition(record.state, state)
    ids = [record.id for record in records]
    values = {"progress": 0.0, **values, "state": state}
    if state in GONE:
        values["ended_at"] = moment(connection)
        for tenant in {record.tenant for record in records}:
            count_bytes(connection, tenant, -sum(record.bytes for record in records if record.tenant == tenant))
    for start in range(0, len(ids), 5000):  # databases bound the number of parameters
        chosen = update(files).where(files.c.id.in_(ids[start : start + 5000]))
        connection.execute(chosen.where(files.c.state.in_({record.state for record in records})).values(values))


def count_bytes(
    connection: Connection, tenant: str, more: int, limit: int | None = None, *, hold: Queue | None = None
) -> None:
    """Add `more` to a tenant's bytes. Nobody else can change the tenant's count before this transaction ends.

    Args:
        hold: how the queue of jobs is held from then on, for `ensure_job`.

    Raises:
        QuotaExceeded: the sum is above the limit; the caller has to abandon the transaction.
    """
    of_tenant = usage.c.tenant == tenant
    if more <= 0:
        connection.execute(update(usage).where(of_tenant).values(bytes=usage.c.bytes + more))
        connection.execute(delete(usage).where(of_tenant, usage.c.bytes <= 0))
        return
    counted = {"tenant": tenant, "bytes": more, "more": more}
    kept = connection.scalar((_COUNT_AND_HOLD[hold] if hold else _COUNT)[connection.dialect.name], counted) or 0
    if limit is not None and kept > limit:
        before = kept - more
        raise QuotaExceeded(f"{before / 1e6:.1f} MB of {limit / 1e6:.1f} are taken, and this has {more / 1e6:.1f}")


@dataclass(frozen=True)
class Standing:
    """What there is of an adapter.

    Attributes:
        background: of its job, whether nobody waits for it; None: there is no job.
        waiting: how many jobs somebody waits for.
    """

    is_published: bool
    background: bool | None
    is_poisonous: bool
    waiting: int

    @property
    def needs_job(self) -> bool:
        """Whether it is neither made nor about to be."""
        return not self.is_published and self.background is None

    def queue(self, limit: int) -> Queue | None:
        """How the queue is to be held; None: not at all."""
        if not self.needs_job:
            return None
        return Queue.MUCH_ROOM if self.waiting < limit - 2 * SPARE else Queue.LITTLE_ROOM


NOTHING_TO_MAKE = Standing(is_published=True, background=None, is_poisonous=False, waiting=0)  # of a document


def standing(connection: Connection, adapter_name: str, revision: str | None = None) -> Standing:
    """What there is of an adapter.

    Args:
        revision: who asks has this one; None: this does not matter.

    Raises:
        OtherModels: files are answered by servers of another revision.
    """
    is_published, background, is_poisonous, waiting, present = connection.execute(
        _STANDING, {"name": adapter_name}
    ).one()
    if revision is not None and present not in (revision, None):
        raise OtherModels
    return Standing(is_published, background, is_poisonous, waiting)


def ensure_job(
    connection: Connection,
    adapter_name: str,
    sha256: str,
    found: Standing,
    *,
    job_attempts: int = 1,
    queue_limit: int | None = None,
    tenant: str | None = None,
    tenant_limit: int | None = None,
    trace: str | None = None,
    background: bool = False,
) -> None:
    """Enter a job for an adapter unless it has one or is published.

    Args:
        job_attempts: attempts per job; a video that has used all of them before gets one.
        queue_limit: bounds the queued jobs that somebody waits for. The caller holds the queue.
        tenant_limit: bounds those for files of `tenant`, whose count of bytes the caller holds.
        background: nobody waits for it yet.

    Raises:
        QueueFull: there is no room for another job; the caller has to abandon the transaction.
        CatalogBusy: very many others were entered since `found`; the same.
    """
    if not found.needs_job:
        if found.background and not background:
            of_adapter = jobs.c.adapter_name == adapter_name
            connection.execute(update(jobs).where(of_adapter).values(background=False))
        return
    values = {
        "adapter_name": adapter_name,
        "sha256": sha256,
        "running": 0,
        "attempts": job_attempts - 1 if found.is_poisonous else 0,
        "background": background,
        "created_at": moment(connection),
        "trace": trace,
    }
    if queue_limit is None:
        connection.execute(_ENTER_JOB, values)
        return
    room = queue_limit - (SPARE if found.queue(queue_limit) is Queue.MUCH_ROOM else 0)
    limits = {"queue_limit": room, "tenant": tenant, "tenant_limit": tenant_limit}
    entering = _ENTER_IN_ROOM if tenant_limit is None else _ENTER_IN_SHARE
    if connection.scalar(entering, {**values, **limits}) is not None:
        return
    for query, limit in ((_WAITING, queue_limit), (_THEIRS, tenant_limit)):
        if limit is not None and (queued := connection.scalar(query, {"tenant": tenant}) or 0) >= limit:
            raise QueueFull(queued, retry_after=max(1, queued // 4))
    raise CatalogBusy("many uploads are entered at once")


def release(connection: Connection, names: Collection[str], *, may_be_late: bool = False) -> None:
    """Let running jobs and their files wait again. The attempt may have left an adapter in the store, or may still put
    it there (`may_be_late`)."""
    chosen = and_(jobs.c.adapter_name.in_(names), jobs.c.token.is_not(None))
    begun = connection.execute(select(jobs.c.adapter_name, jobs.c.token).where(chosen)).all()
    connection.execute(update(jobs).where(jobs.c.adapter_name.in_(names)).values(running=0, pool=None, token=None))
    doom(connection, LATE if may_be_late else ADAPTER, sorted((name, token) for name, token in begun))
    for name in names:
        at_work = [r for r in files_of(connection, name) if r.state in IN_WORK and r.state is not VideoState.UPLOADED]
        move(connection, at_work, VideoState.UPLOADED)


def insert_adapter(connection: Connection, values: dict[str, Any]) -> AdapterRecord:
    """Enter an adapter under a fresh int32 id.

    Raises:
        AdapterIdsExhausted: no fresh id is left; nothing is entered.
    """
    entered = connection.execute(insert(adapters).values({**values, "created_at": moment(connection)}))
    (number,) = entered.inserted_primary_key or (0,)
    if number > LAST_ID:
        connection.execute(delete(adapters).where(adapters.c.id == number))
        raise AdapterIdsExhausted
    record = adapter_of(connection, values["name"])
    assert record is not None
    return record


def drop_adapters(connection: Connection, names: Collection[str]) -> list[Tombstone]:
    """Remove adapters, and every adapter composed of them. The tombstones name what the store has to remove."""
    doomed: set[str] = set()
    found = set(names)
    while found:
        doomed |= found
        made_of = select(parts.c.composed).where(parts.c.part.in_(found))
        found = set(connection.scalars(made_of)) - doomed
    if not doomed:
        return []
    removed = delete(adapters).where(adapters.c.name.in_(doomed)).returning(adapters.c.name, adapters.c.generation)
    there = sorted((name, generation) for name, generation in connection.execute(removed))
    connection.execute(delete(parts).where(parts.c.composed.in_(doomed)))
    return doom(connection, ADAPTER, there)


def is_referred_to(connection: Connection, adapter_name: str) -> bool:
    """Whether a live file answers from this adapter, waits for it, or keeps it until another is made."""
    named = or_(files.c.adapter_name == adapter_name, files.c.previous_adapter == adapter_name)
    return connection.scalar(select(files.c.id).where(named, files.c.state.in_(LIVE)).limit(1)) is not None


def drop_unwanted(connection: Connection, names: Collection[str | None]) -> list[Tombstone]:
    """Remove those of these adapters that no file refers to any more, and their queued jobs."""
    unwanted = [name for name in names if name is not None and not is_referred_to(connection, name)]
    if not unwanted:
        return []
    # A running job stays: its worker finds that nobody waits and drops the result.
    chosen = and_(jobs.c.adapter_name.in_(unwanted), jobs.c.token.is_not(None))
    running = connection.execute(select(jobs.c.adapter_name, jobs.c.token).where(chosen)).all()
    doomed = doom(connection, ADAPTER, sorted((name, token) for name, token in running))
    doomed += drop_jobs(connection, and_(jobs.c.adapter_name.in_(unwanted), jobs.c.running == 0))
    return doomed + drop_adapters(connection, unwanted)


def end_file(connection: Connection, record: FileRecord, state: VideoState) -> list[Tombstone]:
    """Delete or expire a file. The tombstones name what the store has to remove because of it."""
    move(connection, [record], state)
    doomed = doom_video_unless_named(connection, record.sha256, record.generation)
    return doomed + drop_unwanted(connection, [record.adapter_name, record.previous_adapter])


def drop_jobs(connection: Connection, chosen: Any) -> list[Tombstone]:
    """Remove jobs that nobody waits for. A job that was begun may have left an adapter in the store."""
    dropped = connection.execute(delete(jobs).where(chosen).returning(jobs.c.adapter_name, jobs.c.token))
    return doom(connection, ADAPTER, sorted((name, token) for name, token in dropped if token is not None))
