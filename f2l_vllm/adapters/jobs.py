"""The catalog's jobs: adapters to be made. A job stands for one adapter, however many files wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, select, update

from f2l_vllm.adapters.database import Database
from f2l_vllm.adapters.errors import AdapterIdsExhausted
from f2l_vllm.adapters.rows import EXHAUSTED, adapter_of, files_of, insert_adapter, is_referred_to, move, release
from f2l_vllm.adapters.states import IN_WORK, VideoState
from f2l_vllm.adapters.tables import AdapterRecord, Job, files, jobs

__all__ = ["EXHAUSTED", "Jobs"]


class Jobs(Database):
    """What the pool does with the catalog."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._turn = 0
        self._turns: dict[str | None, int] = {}  # tenant -> its last turn, in this process

    def claim_jobs(self, limit: int) -> list[Job]:
        """Take up to `limit` waiting jobs: tenants take turns, each with its oldest; what nobody waits for comes last.

        A job that has cost a worker before is taken alone, so that it costs its neighbours nothing.
        """
        waiting = and_(files.c.adapter_name == jobs.c.adapter_name, files.c.state.in_(IN_WORK))
        query = select(jobs, files.c.tenant).outerjoin(files, waiting).where(jobs.c.running == 0)
        with self._read() as connection:
            if connection.scalar(select(jobs.c.id).where(jobs.c.running == 0).limit(1)) is None:
                return []  # idle lanes take no write lock
        with self._write() as connection:
            order = self._in_turns(connection.execute(query.order_by(jobs.c.background, jobs.c.id)).all())[:limit]
            if not order:
                return []
            rows = [row for row in order if row.attempts == 0 or row is order[0]]
            if rows[0].attempts > 0:
                rows = rows[:1]
            for row in rows:
                self._turn += 1
                self._turns[row.tenant] = self._turn
            chosen = update(jobs).where(jobs.c.id.in_([row.id for row in rows]))
            connection.execute(chosen.values(running=1, attempts=jobs.c.attempts + 1))
            return [Job(row.adapter_name, row.sha256, row.attempts + 1) for row in rows]

    def _in_turns(self, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
        """Rows of jobs and who waits for them, oldest first, in the order of their turns; each job once."""
        seen: Counter[str | None] = Counter()
        keys = []
        for row in rows:
            keys.append((row.background, seen[row.tenant], self._turns.get(row.tenant, 0), row.id))
            seen[row.tenant] += 1
        first: dict[int, Row[Any]] = {}
        for _, row in sorted(zip(keys, rows, strict=True), key=lambda pair: pair[0]):
            first.setdefault(row.id, row)  # a job of several tenants comes at the first of its places
        return list(first.values())

    def advance(self, adapter_name: str, state: VideoState, progress: float) -> None:
        """A job's worker has reached `state`; `progress` is 0..1 within it."""
        with self._write() as connection:
            waiting = [record for record in files_of(connection, adapter_name) if record.state in IN_WORK]
            move(connection, [r for r in waiting if r.state is not state], state)
            ids = [record.id for record in waiting]
            connection.execute(update(files).where(files.c.id.in_(ids)).values(progress=progress))

    def finish_job(self, adapter_name: str, *, rank: int, size: int, info: dict[str, Any]) -> AdapterRecord | None:
        """The adapter is published: its files are ready. None when every file was deleted meanwhile.

        When no adapter id is left, its files fail with `adapter_ids_exhausted`, and None is returned.
        """
        with self._write() as connection:
            connection.execute(delete(jobs).where(jobs.c.adapter_name == adapter_name))
            waiting = [record for record in files_of(connection, adapter_name) if record.state in IN_WORK]
            if not waiting:
                return None
            values = {"name": adapter_name, "rank": rank, "bytes": size, "info": info}
            try:
                adapter = insert_adapter(connection, values)
            except AdapterIdsExhausted as error:
                move(connection, waiting, VideoState.ERROR, error_code=error.code, error_message=str(error))
                return None
            move(connection, waiting, VideoState.PROCESSED, progress=1.0, previous_adapter=None)
            return adapter

    def fail_job(self, adapter_name: str, code: str, message: str) -> None:
        """The video cannot be internalized: every file waiting for it says why."""
        with self._write() as connection:
            connection.execute(delete(jobs).where(jobs.c.adapter_name == adapter_name))
            waiting = [record for record in files_of(connection, adapter_name) if record.state in IN_WORK]
            move(connection, waiting, VideoState.ERROR, error_code=code, error_message=message[:2048])

    def release_job(self, adapter_name: str, *, blameless: bool = False) -> None:
        """A worker died over the job: it waits again, first in line (jobs are taken in the order they came).

        `blameless` when the video had no part in it: the attempt does not count. A job that nobody waits for any more
        goes.
        """
        with self._write() as connection:
            release(connection, [adapter_name])
            _drop_unwanted(connection, [adapter_name])
            if blameless:
                counted = (jobs.c.adapter_name == adapter_name) & (jobs.c.attempts > 0)
                connection.execute(update(jobs).where(counted).values(attempts=jobs.c.attempts - 1))

    def release_all_jobs(self, *, blameless: bool) -> int:
        """No pool is running: whatever was in work waits again. Returns how many jobs were.

        `blameless` after a stop in order: the attempt does not count.
        """
        with self._write() as connection:
            names = list(connection.scalars(select(jobs.c.adapter_name).where(jobs.c.running == 1)))
            if blameless:
                connection.execute(update(jobs).where(jobs.c.running == 1).values(attempts=jobs.c.attempts - 1))
            release(connection, names)
            _drop_unwanted(connection, names)
            return len(names)

    def hurry_job(self, adapter_name: str) -> None:
        """Somebody waits for this adapter: a background job for it takes its place among the others."""
        with self._read() as connection:
            of_adapter = jobs.c.adapter_name == adapter_name
            background = connection.scalar(select(jobs.c.background).where(of_adapter))
        if background:
            with self._write() as connection:
                connection.execute(update(jobs).where(of_adapter).values(background=False))

    def wanted(self, adapter_name: str) -> bool:
        """Whether this adapter is published, or any file waits for it."""
        with self._read() as connection:
            if adapter_of(connection, adapter_name) is not None:
                return True
            return any(record.state is not VideoState.ERROR for record in files_of(connection, adapter_name))


def _drop_unwanted(connection: Connection, names: Collection[str]) -> None:
    unwanted = [name for name in names if not is_referred_to(connection, name)]
    connection.execute(delete(jobs).where(jobs.c.adapter_name.in_(unwanted)))
