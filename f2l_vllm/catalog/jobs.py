"""The catalog's jobs: adapters to be made. A job makes one adapter, however many files wait for it.

Pools of several servers may share a catalog. A running job belongs to the pool that claimed it until that pool has
given no sign of life for `LEASE_SECONDS`. Each attempt has a token. It puts its adapter into the store under the token,
and the token says whose report about a job counts: that of an attempt that was given up is ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, exists, func, insert, or_, select, update

from f2l_vllm.catalog.database import Database, write_tombstones
from f2l_vllm.catalog.states import IN_WORK, LIVE, VideoState
from f2l_vllm.catalog.tables import ADAPTER, AdapterRecord, Job, adapters, files, jobs, pools, serving
from f2l_vllm.catalog.tombstones import doom, reopen
from f2l_vllm.catalog.transactions import (
    EXHAUSTED,
    PRESENT,
    adapter_of,
    drop_jobs,
    files_of,
    insert_adapter,
    is_referred_to,
    move,
    release,
)
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.address import object_name
from f2l_vllm.store.errors import AdapterIdsExhausted

__all__ = ["EXHAUSTED", "LEASE_SECONDS", "Jobs"]

_TOKEN_BYTES = 8
LEASE_SECONDS = 60.0  # many times the interval between two signs of life
_WAITING = files.c.state == VideoState.UPLOADED


class Jobs(Database):
    """What the pool does with the catalog. `pool` is its name, unique among running pools; None: there is one pool."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pool: str | None = None
        self.revision: str | None = None  # of what this process makes and uses; None: it does not matter, as in tools
        self._turn = 0
        self._turns: dict[str | None, int] = {}  # tenant -> its last turn, in this process

    def next_videos(self, limit: int) -> list[str]:
        """The videos of up to `limit` jobs that would be claimed next, in their order, by their names in the store.
        Those that have cost a worker before are left out."""
        with self._read() as connection:
            if connection.scalar(select(jobs.c.id).where(jobs.c.running == 0).limit(1)) is None:
                return []
            hashes = [row.sha256 for row, _ in self._in_turns(connection, limit) if row.attempts == 0]
            return [object_name(sha256, _generation(connection, sha256) or "") for sha256 in hashes]

    def claim_jobs(self, limit: int, *, ahead: str | None = None, among: int = 1) -> list[Job]:
        """Take up to `limit` waiting jobs. Tenants take turns, oldest job first; jobs that nobody waits for come last.
        A job whose video is `ahead` comes first if it is one of the next `among`.

        A job that has cost a worker before is taken alone, so that it cannot harm other jobs. There are none while
        files are answered by servers of another revision.
        """
        with self._read() as connection:
            if connection.scalar(select(jobs.c.id).where(jobs.c.running == 0).limit(1)) is None:
                return []  # idle lanes take no write lock
        with self._write(beside=()) as connection:
            order = self._in_turns(connection, max(limit, among if ahead else 0))
            if not order:
                return []
            if ahead is not None and order[0][0].attempts == 0:
                order.sort(key=lambda one: one[0].sha256 != ahead.partition(".")[0])
            order = order[:limit]
            rows = [(row, tenant) for row, tenant in order if row.attempts == 0 or row is order[0][0]]
            if rows[0][0].attempts > 0:
                rows = rows[:1]
            # Skip the jobs that another pool is about to take.
            free = select(jobs.c.id).where(jobs.c.id.in_([row.id for row, _ in rows]), jobs.c.running == 0)
            chosen = update(jobs).where(jobs.c.id.in_(free.with_for_update(skip_locked=True)))
            if self.revision is not None:
                chosen = chosen.where(exists(PRESENT.where(serving.c.revision == self.revision)))
            token = secrets.token_hex(_TOKEN_BYTES)
            values = {"running": 1, "attempts": jobs.c.attempts + 1, "pool": self.pool, "token": token}
            taken = set(connection.scalars(chosen.values(values).returning(jobs.c.id)))
            rows = [(row, tenant) for row, tenant in rows if row.id in taken]
            for _, tenant in rows:
                self._turn += 1
                self._turns[tenant] = self._turn
            copies = {row.sha256: _generation(connection, row.sha256) or "" for row, _ in rows}
            return [
                Job(row.adapter_name, row.sha256, row.attempts + 1, copies[row.sha256], token, row.trace)
                for row, _ in rows
            ]

    def _in_turns(self, connection: Connection, limit: int) -> list[tuple[Row[Any], str | None]]:
        """Up to `limit` waiting jobs in the order of their turns, each once, with the tenant whose turn it is.

        However many jobs wait, this reads at most `limit` jobs of each tenant whose turn comes next.
        """
        waiting = and_(jobs.c.running == 0, jobs.c.background.is_(False))
        of_files = select(jobs).join(files, and_(files.c.adapter_name == jobs.c.adapter_name, _WAITING)).where(waiting)
        queues: list[list[tuple[Row[Any], str | None]]] = []
        in_line = connection.execute(select(jobs.c.id).where(waiting).limit(1)).first()
        for tenant in self._tenants(connection) if in_line is not None else ():
            oldest = of_files.where(files.c.tenant == tenant).order_by(files.c.number).limit(limit)
            if found := connection.execute(oldest).all():
                queues.append([(row, tenant) for row in found])
            if len(queues) == limit:
                break
        order: dict[int, tuple[Row[Any], str | None]] = {}
        for turn in range(limit):
            for queue in queues:
                if turn < len(queue):
                    # A job of several tenants takes the earliest of its places.
                    order.setdefault(queue[turn][0].id, queue[turn])
        if len(order) < limit:
            rest = select(jobs).where(jobs.c.running == 0).order_by(jobs.c.background, jobs.c.id).limit(limit)
            for row in connection.execute(rest):
                order.setdefault(row.id, (row, None))
        return list(order.values())[:limit]

    def _tenants(self, connection: Connection) -> list[str]:
        """The tenants with waiting files, ordered by their last turns, then by their oldest files.

        The query steps from tenant to tenant in an index, so its cost does not depend on the number of files.
        """
        known = select(func.min(files.c.tenant).label("tenant")).where(_WAITING).cte("known", recursive=True)
        beyond = select(func.min(files.c.tenant)).where(_WAITING, files.c.tenant > known.c.tenant).scalar_subquery()
        known = known.union_all(select(beyond).where(known.c.tenant.is_not(None)))
        oldest = select(func.min(files.c.number)).where(_WAITING, files.c.tenant == known.c.tenant).scalar_subquery()
        rows = connection.execute(select(known.c.tenant, oldest.label("oldest")).where(known.c.tenant.is_not(None)))
        return [row.tenant for row in sorted(rows, key=lambda row: (self._turns.get(row.tenant, 0), row.oldest))]

    def jobs(self) -> tuple[int, int]:
        """Jobs waiting, jobs running."""
        with self._read() as connection:
            by_running = select(jobs.c.running, func.count()).group_by(jobs.c.running)
            counted = {row[0]: row[1] for row in connection.execute(by_running)}
        return counted.get(0, 0), counted.get(1, 0)

    # What becomes of a running job. `token` is that of the attempt that says so; without one, as in tools, the pool
    # is enough.

    def advance(self, adapter_name: str, state: VideoState, progress: float, *, token: str | None = None) -> None:
        """Note that a job's worker has reached `state`; `progress` is 0..1 within it."""
        with self._write(beside=()) as connection:
            if not self._holds(connection, adapter_name, token):
                return
            waiting = [r for r in files_of(connection, adapter_name, hold=True) if r.state in IN_WORK]
            move(connection, [r for r in waiting if r.state is not state], state)
            at_work = and_(files.c.id.in_([record.id for record in waiting]), files.c.state == state)
            connection.execute(update(files).where(at_work).values(progress=progress))

    def finish_job(
        self, adapter_name: str, *, rank: int, size: int, info: AdapterInfo, token: str | None = None
    ) -> AdapterRecord | None:
        """Enter the published adapter and make its files ready. None if every file was deleted meanwhile, or if the
        attempt was given up; what it has put into the store is to be removed then.

        If no adapter id is left, its files fail with `adapter_ids_exhausted`, and None is returned.
        """
        with self._read() as connection:
            video = connection.scalar(select(jobs.c.sha256).where(jobs.c.adapter_name == adapter_name))
        with self._write(beside=[video or ""]) as connection:
            reopen(connection, adapter_name)
            if not self._holds(connection, adapter_name, token):
                return None
            connection.execute(delete(jobs).where(jobs.c.adapter_name == adapter_name))
            waiting = [r for r in files_of(connection, adapter_name, hold=True) if r.state in IN_WORK]
            if not waiting:
                write_tombstones(connection)
                doom(connection, ADAPTER, [(adapter_name, token or "")])
                return None
            values = {"name": adapter_name, "rank": rank, "bytes": size, "info": info, "generation": token or ""}
            try:
                adapter = insert_adapter(connection, values)
            except AdapterIdsExhausted as error:
                move(connection, waiting, VideoState.ERROR, error_code=error.code, error_message=str(error))
                write_tombstones(connection)
                doom(connection, ADAPTER, [(adapter_name, token or "")])
                return None
            move(connection, waiting, VideoState.PROCESSED, progress=1.0, previous_adapter=None)
            return adapter

    def fail_job(
        self,
        adapter_name: str,
        code: str,
        message: str,
        *,
        generation: str | None = None,
        token: str | None = None,
    ) -> None:
        """End the job of a video that cannot be internalized; every file that waits for it gets the reason.

        Args:
            generation: the copy of its bytes in which the fault was found. If its files have another copy by now, the
                job waits again instead, and the attempt does not count.
        """
        with self._write() as connection:
            if not self._holds(connection, adapter_name, token):
                return
            sha256 = connection.scalar(select(jobs.c.sha256).where(jobs.c.adapter_name == adapter_name))
            if generation is not None and _generation(connection, sha256 or "") not in (generation, None):
                _release(connection, adapter_name, blameless=True)
                return
            drop_jobs(connection, jobs.c.adapter_name == adapter_name)
            waiting = [r for r in files_of(connection, adapter_name, hold=True) if r.state in IN_WORK]
            move(connection, waiting, VideoState.ERROR, error_code=code, error_message=message[:2048])

    def release_job(self, adapter_name: str, *, blameless: bool = False, token: str | None = None) -> None:
        """Let a job wait again after its worker died. It is first in line: jobs are taken in the order they came.

        `blameless`: the video was not the cause, so the attempt does not count. A job that nobody waits for any more
        is deleted.
        """
        with self._write() as connection:
            if not self._holds(connection, adapter_name, token):
                return
            _release(connection, adapter_name, blameless=blameless)

    def release_all_jobs(self, *, blameless: bool) -> int:
        """Let all jobs that this pool was running wait again. Returns how many there were.

        `blameless`: the pool stopped in order, so the attempt does not count.
        """
        ours = or_(jobs.c.pool.is_(None), jobs.c.pool == self.pool)
        with self._write() as connection:
            return _release_all(connection, ours, blameless=blameless)

    def beat(self) -> int:
        """Note that this pool runs. Jobs of pools without a sign of life for `LEASE_SECONDS` wait again, and the
        attempt counts. Returns how many such jobs there were."""
        with self._write(beside=()) as connection:
            now = self._clock(connection)
            if connection.execute(update(pools).where(pools.c.id == self.pool).values(seen_at=now)).rowcount == 0:
                connection.execute(insert(pools).values(id=self.pool, seen_at=now))
            gone = pools.c.seen_at < now - LEASE_SECONDS
            of_the_dead = and_(jobs.c.pool.is_not(None), jobs.c.pool.not_in(select(pools.c.id).where(~gone)))
            if not connection.scalar(select(or_(exists().where(gone), exists().where(of_the_dead)))):
                return 0
        with self._write() as connection:
            connection.execute(delete(pools).where(gone))
            return _release_all(connection, of_the_dead, blameless=False, may_be_late=True)

    def hurry_job(self, adapter_name: str) -> None:
        """Turn a background job for this adapter into an ordinary one, because somebody waits for it now."""
        with self._read() as connection:
            of_adapter = jobs.c.adapter_name == adapter_name
            background = connection.scalar(select(jobs.c.background).where(of_adapter))
        if background:
            with self._write(beside=()) as connection:
                connection.execute(update(jobs).where(of_adapter).values(background=False))

    def refers_to(self, name: str) -> bool:
        """Whether an adapter is published whose files have this name in the store."""
        address, _, generation = name.partition(".")
        published = exists().where(adapters.c.name == address, adapters.c.generation == generation)
        with self._read() as connection:
            return bool(connection.scalar(select(published)))

    def wanted(self, adapter_name: str, *, token: str | None = None) -> bool:
        """Whether this adapter is published or any file waits for it. False for an attempt that was given up."""
        with self._read() as connection:
            if token is not None and not self._holds(connection, adapter_name, token):
                return False
            if adapter_of(connection, adapter_name) is not None:
                return True
            return any(record.state is not VideoState.ERROR for record in files_of(connection, adapter_name))

    def _holds(self, connection: Connection, adapter_name: str, token: str | None) -> bool:
        """Whether a job is this attempt's. Another may have begun while this one's pool gave no sign of life."""
        if token is not None:
            mine = jobs.c.token == token
        elif self.pool is not None:
            mine = jobs.c.pool == self.pool
        else:
            return True
        return connection.scalar(select(jobs.c.id).where(jobs.c.adapter_name == adapter_name, mine)) is not None


def _release_all(connection: Connection, chosen: Any, *, blameless: bool, may_be_late: bool = False) -> int:
    chosen = and_(jobs.c.running == 1, chosen)
    names = list(connection.scalars(select(jobs.c.adapter_name).where(chosen)))
    if names and blameless:
        connection.execute(update(jobs).where(chosen).values(attempts=jobs.c.attempts - 1))
    release(connection, names, may_be_late=may_be_late)
    _drop_unwanted(connection, names)
    return len(names)


def _release(connection: Connection, adapter_name: str, *, blameless: bool) -> None:
    release(connection, [adapter_name])
    _drop_unwanted(connection, [adapter_name])
    if blameless:
        counted = (jobs.c.adapter_name == adapter_name) & (jobs.c.attempts > 0)
        connection.execute(update(jobs).where(counted).values(attempts=jobs.c.attempts - 1))


def _drop_unwanted(connection: Connection, names: Collection[str]) -> None:
    unwanted = [name for name in names if not is_referred_to(connection, name)]
    drop_jobs(connection, jobs.c.adapter_name.in_(unwanted))


def _generation(connection: Connection, sha256: str) -> str | None:
    """The generation that live files with this hash name; None if there is no such file."""
    query = select(files.c.generation).where(files.c.sha256 == sha256, files.c.state.in_(LIVE)).limit(1)
    generation: str | None = connection.scalar(query)
    return generation
