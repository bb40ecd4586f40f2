"""The catalog: which files exist, which adapter answers for each, and which adapters are still to be made.

It is the one truth about a video's state; servers and pools in any number of processes share it. Every method is one
transaction. A job stands for one adapter, so a thousand uploads of the same bytes wait for the same job.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, delete, func, insert, select, update

from f2l_vllm.adapters.states import IN_WORK, VideoState, check_transition
from f2l_vllm.adapters.tables import AdapterRecord, FileRecord, Job, adapters, files, jobs, open_engine

_LIVE = [state.value for state in VideoState if state not in (VideoState.DELETED, VideoState.EXPIRED)]
_GONE = (VideoState.DELETED, VideoState.EXPIRED)


class QueueFull(RuntimeError):
    """No room for another job; `retry_after` is a guess in seconds."""

    def __init__(self, queued: int, retry_after: int) -> None:
        super().__init__(f"{queued} videos are waiting to be internalized already")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Removal:
    """A file that left the catalog, and what nobody refers to any more because of it."""

    file: FileRecord
    orphaned_adapter: AdapterRecord | None
    orphaned_video: bool


class Catalog:
    """Files, adapters and jobs in one database."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(read=True) as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    # Files

    def add_file(
        self,
        *,
        tenant: str,
        filename: str,
        purpose: str,
        size: int,
        sha256: str,
        adapter_name: str,
        expires_at: float | None,
        queue_limit: int,
    ) -> FileRecord:
        """Enter a file; ready at once if its adapter exists, else waiting for the adapter's job.

        Raises:
            QueueFull: the adapter needs a new job and `queue_limit` jobs wait already. Nothing is entered then.
        """
        with self._write() as connection:
            ready = connection.scalar(select(adapters.c.id).where(adapters.c.name == adapter_name)) is not None
            if not ready:
                _ensure_job(connection, adapter_name, sha256, queue_limit)
            file_id = f"file-{secrets.token_hex(12)}"
            values = {
                "id": file_id,
                "tenant": tenant,
                "filename": filename,
                "purpose": purpose,
                "bytes": size,
                "sha256": sha256,
                "adapter_name": adapter_name,
                "state": VideoState.PROCESSED if ready else VideoState.UPLOADED,
                "progress": 1.0 if ready else 0.0,
                "created_at": time.time(),
                "expires_at": expires_at,
            }
            connection.execute(insert(files).values(values))
            record = _file(connection, file_id, tenant)
            assert record is not None
            return record

    def file(self, file_id: str, tenant: str) -> FileRecord | None:
        """The file, or None: unknown, deleted, expired or another tenant's."""
        with self._read() as connection:
            record = _file(connection, file_id, tenant)
        if record is None or record.state in _GONE or _is_past(record.expires_at):
            return None
        return record

    def files(
        self, tenant: str, *, after: str | None, limit: int, descending: bool, purpose: str | None = None
    ) -> tuple[list[FileRecord], bool]:
        """One page of a tenant's files in upload order, and whether more follow.

        Raises:
            KeyError: `after` names no file of this tenant.
        """
        query = select(files).where(files.c.tenant == tenant, files.c.state.in_(_LIVE), _not_past())
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._read() as connection:
            if after is not None:
                cursor = _file(connection, after, tenant)
                if cursor is None:
                    raise KeyError(after)
                edge = cursor.number
                query = query.where(files.c.number < edge if descending else files.c.number > edge)
            order = files.c.number.desc() if descending else files.c.number
            rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
        return [_record(row) for row in rows[:limit]], len(rows) > limit

    def states(self, file_ids: Collection[str]) -> dict[str, VideoState]:
        """The states of these files; unknown ids are absent."""
        with self._read() as connection:
            rows = connection.execute(select(files.c.id, files.c.state).where(files.c.id.in_(file_ids)))
            return {row.id: VideoState(row.state) for row in rows}

    def has_video(self, sha256: str) -> bool:
        """Whether any live file has these bytes."""
        with self._read() as connection:
            query = select(files.c.id).where(files.c.sha256 == sha256, files.c.state.in_(_LIVE)).limit(1)
            return connection.scalar(query) is not None

    def remove_file(self, file_id: str, tenant: str) -> Removal | None:
        """Delete a file id; None when there is no such file. Its queued job goes too if nobody else waits for it."""
        with self._write() as connection:
            record = _file(connection, file_id, tenant)
            if record is None or record.state in _GONE:
                return None
            return _remove(connection, record, VideoState.DELETED)

    def expire_files(self, now: float) -> list[Removal]:
        """Expire every file whose time has come."""
        with self._write() as connection:
            due = select(files).where(files.c.expires_at <= now, files.c.state.in_(_LIVE))
            return [_remove(connection, _record(row), VideoState.EXPIRED) for row in connection.execute(due).all()]

    # Adapters

    def adapter(self, name: str) -> AdapterRecord | None:
        """The published adapter of this name, or None."""
        with self._read() as connection:
            return _adapter(connection, name)

    def adapters_of(self, records: Collection[FileRecord]) -> dict[str, AdapterRecord]:
        """The published adapters of these files, by name."""
        names = sorted({record.adapter_name for record in records if record.state is VideoState.PROCESSED})
        found: dict[str, AdapterRecord] = {}
        with self._read() as connection:
            for start in range(0, len(names), 500):  # databases bound the number of parameters
                query = select(adapters).where(adapters.c.name.in_(names[start : start + 500]))
                found |= {row.name: AdapterRecord(**row._mapping) for row in connection.execute(query)}
        return found

    def forget_adapter(self, adapter: AdapterRecord, *, queue_limit: int) -> None:
        """An adapter was found missing or damaged: its files wait again, for a new job under the same name.

        Nothing happens when it is forgotten already, or made again meanwhile.
        """
        name = adapter.name
        with self._write() as connection:
            if connection.execute(delete(adapters).where(adapters.c.id == adapter.id)).rowcount == 0:
                return
            waiting = [record for record in _files_of(connection, name) if record.state is VideoState.PROCESSED]
            if waiting:
                _ensure_job(connection, name, waiting[0].sha256, queue_limit)
            _move(connection, waiting, VideoState.UPLOADED)

    # Jobs

    def claim_jobs(self, limit: int) -> list[Job]:
        """Take up to `limit` of the oldest waiting jobs.

        A job that has cost a worker before is taken alone, so that it costs its neighbours nothing.
        """
        with self._write() as connection:
            oldest = select(jobs).where(jobs.c.running == 0).order_by(jobs.c.id).limit(limit)
            rows = list(connection.execute(oldest.with_for_update(skip_locked=True)))
            if rows and rows[0].attempts > 0:
                rows = rows[:1]
            rows = [row for row in rows if row.attempts == 0 or row is rows[0]]
            chosen = update(jobs).where(jobs.c.id.in_([row.id for row in rows]))
            connection.execute(chosen.values(running=1, attempts=jobs.c.attempts + 1))
            return [Job(row.adapter_name, row.sha256, row.attempts + 1) for row in rows]

    def advance(self, adapter_name: str, state: VideoState, progress: float) -> None:
        """A job's worker has reached `state`; `progress` is 0..1 within it."""
        with self._write() as connection:
            waiting = [record for record in _files_of(connection, adapter_name) if record.state in IN_WORK]
            _move(connection, [r for r in waiting if r.state is not state], state)
            ids = [record.id for record in waiting]
            connection.execute(update(files).where(files.c.id.in_(ids)).values(progress=progress))

    def finish_job(self, adapter_name: str, *, rank: int, size: int, info: dict[str, Any]) -> AdapterRecord | None:
        """The adapter is published: its files are ready. None when every file was deleted meanwhile."""
        with self._write() as connection:
            connection.execute(delete(jobs).where(jobs.c.adapter_name == adapter_name))
            waiting = [record for record in _files_of(connection, adapter_name) if record.state in IN_WORK]
            if not waiting:
                return None
            values = {"name": adapter_name, "rank": rank, "bytes": size, "info": info, "created_at": time.time()}
            connection.execute(insert(adapters).values(values))
            _move(connection, waiting, VideoState.PROCESSED, progress=1.0)
            return _adapter(connection, adapter_name)

    def fail_job(self, adapter_name: str, code: str, message: str) -> None:
        """The video cannot be internalized: every file waiting for it says why."""
        with self._write() as connection:
            connection.execute(delete(jobs).where(jobs.c.adapter_name == adapter_name))
            waiting = [record for record in _files_of(connection, adapter_name) if record.state in IN_WORK]
            _move(connection, waiting, VideoState.ERROR, error_code=code, error_message=message[:2048])

    def release_job(self, adapter_name: str) -> None:
        """A worker died over the job: it waits again, first in line (jobs are taken in the order they came)."""
        with self._write() as connection:
            _release(connection, [adapter_name])

    def release_all_jobs(self) -> int:
        """No pool is running: whatever was in work waits again, and a stop costs no attempt. Returns how many."""
        with self._write() as connection:
            names = list(connection.scalars(select(jobs.c.adapter_name).where(jobs.c.running == 1)))
            connection.execute(update(jobs).where(jobs.c.running == 1).values(attempts=jobs.c.attempts - 1))
            _release(connection, names)
            return len(names)

    def wanted(self, adapter_name: str) -> bool:
        """Whether any file waits for this adapter or answers from it."""
        with self._read() as connection:
            return any(record.state is not VideoState.ERROR for record in _files_of(connection, adapter_name))

    def counts(self) -> tuple[dict[str, int], int, int]:
        """Files by state, jobs waiting, jobs running."""
        with self._read() as connection:
            by_state = select(files.c.state, func.count()).where(files.c.state.in_(_LIVE)).group_by(files.c.state)
            states = {row[0]: row[1] for row in connection.execute(by_state)}
            by_running = select(jobs.c.running, func.count()).group_by(jobs.c.running)
            running = {row[0]: row[1] for row in connection.execute(by_running)}
        return states, running.get(0, 0), running.get(1, 0)


def _is_past(moment: float | None) -> bool:
    return moment is not None and moment <= time.time()


def _not_past() -> Any:
    return (files.c.expires_at.is_(None)) | (files.c.expires_at > time.time())


def _record(row: Row[Any]) -> FileRecord:
    return FileRecord(**{**row._mapping, "state": VideoState(row.state)})


def _file(connection: Connection, file_id: str, tenant: str) -> FileRecord | None:
    row = connection.execute(select(files).where(files.c.id == file_id, files.c.tenant == tenant)).first()
    return None if row is None else _record(row)


def _adapter(connection: Connection, name: str) -> AdapterRecord | None:
    row = connection.execute(select(adapters).where(adapters.c.name == name)).first()
    return None if row is None else AdapterRecord(**row._mapping)


def _files_of(connection: Connection, adapter_name: str) -> list[FileRecord]:
    query: Select[Any] = select(files).where(files.c.adapter_name == adapter_name, files.c.state.in_(_LIVE))
    return [_record(row) for row in connection.execute(query)]


def _move(connection: Connection, records: Collection[FileRecord], state: VideoState, **values: Any) -> None:
    for record in records:
        check_transition(record.state, state)
    ids = [record.id for record in records]
    values = {"progress": 0.0, **values, "state": state}
    connection.execute(update(files).where(files.c.id.in_(ids)).values(values))


def _ensure_job(connection: Connection, adapter_name: str, sha256: str, queue_limit: int) -> None:
    if connection.scalar(select(jobs.c.id).where(jobs.c.adapter_name == adapter_name)) is not None:
        return
    queued = connection.scalar(select(func.count()).select_from(jobs).where(jobs.c.running == 0)) or 0
    if queued >= queue_limit:
        raise QueueFull(queued, retry_after=max(1, queued // 4))
    values = {"adapter_name": adapter_name, "sha256": sha256, "running": 0, "attempts": 0, "created_at": time.time()}
    connection.execute(insert(jobs).values(values))


def _release(connection: Connection, names: list[str]) -> None:
    connection.execute(update(jobs).where(jobs.c.adapter_name.in_(names)).values(running=0))
    for name in names:
        at_work = [r for r in _files_of(connection, name) if r.state in IN_WORK and r.state is not VideoState.UPLOADED]
        _move(connection, at_work, VideoState.UPLOADED)


def _remove(connection: Connection, record: FileRecord, state: VideoState) -> Removal:
    _move(connection, [record], state)
    adapter = None
    if not _files_of(connection, record.adapter_name):
        adapter = _adapter(connection, record.adapter_name)
        connection.execute(delete(adapters).where(adapters.c.name == record.adapter_name))
        # A running job is left to its worker, which finds that nobody waits and drops the result.
        waiting = and_(jobs.c.adapter_name == record.adapter_name, jobs.c.running == 0)
        connection.execute(delete(jobs).where(waiting))
    same_bytes = select(func.count()).select_from(files).where(files.c.sha256 == record.sha256)
    left = connection.scalar(same_bytes.where(files.c.state.in_(_LIVE)))
    return Removal(record, adapter, orphaned_video=not left)
