"""The catalog: which files exist, which adapter answers for each, and which adapters are still to be made.

It is the one truth about a video's state; servers and pools in any number of processes share it. Every method is one
transaction, and raises `Unavailable` when the database is busy, full or away; nothing is changed then.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, delete, exists, func, insert, or_, select, update

from f2l_vllm.adapters.adoption import Adoption
from f2l_vllm.adapters.jobs import Jobs
from f2l_vllm.adapters.rows import (
    GONE,
    LIVE,
    QueueFull,
    adapter_of,
    adapter_record,
    drop_adapters,
    drop_unwanted,
    ensure_job,
    file_of,
    file_record,
    files_of,
    insert_adapter,
    move,
)
from f2l_vllm.adapters.states import VideoState
from f2l_vllm.adapters.tables import AdapterRecord, FileRecord, Found, adapters, files, jobs, parts

__all__ = ["Catalog", "QueueFull", "Removal"]

_PARAMETERS = 500  # databases bound the number of parameters
# What every question asks. Made once: putting the statement together takes longer than running it.
_OF_FILE = and_(adapters.c.name == files.c.adapter_name, files.c.state == VideoState.PROCESSED)
_FIND = (
    select(files, adapters)
    .outerjoin(adapters, _OF_FILE)
    .where(files.c.tenant == bindparam("tenant"), files.c.id.in_(bindparam("ids", expanding=True)))
)


@dataclass(frozen=True)
class Removal:
    """A file that left the catalog, and what nobody refers to any more because of it."""

    file: FileRecord
    orphaned_adapters: list[AdapterRecord]
    orphaned_video: bool


class Catalog(Adoption, Jobs):
    """Files, adapters and jobs in one database."""

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
        idle_seconds: float | None = None,
        pinned: bool = False,
        tenant_limit: int | None = None,
        job_attempts: int = 1,
    ) -> FileRecord:
        """Enter a file; ready at once if its adapter exists, else waiting for the adapter's job.

        Raises:
            QueueFull: the adapter needs a new job and `queue_limit` jobs wait already, or `tenant_limit` jobs for this
                tenant. Nothing is entered then.
        """
        with self._write() as connection:
            ready = adapter_of(connection, adapter_name) is not None
            if not ready:
                ensure_job(
                    connection,
                    adapter_name,
                    sha256,
                    queue_limit,
                    tenant=tenant,
                    tenant_limit=tenant_limit,
                    job_attempts=job_attempts,
                )
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
                "idle_seconds": idle_seconds,
                "pinned": pinned,
            }
            connection.execute(insert(files).values(values))
            record = file_of(connection, file_id, tenant)
            assert record is not None
            return record

    def file(self, file_id: str, tenant: str) -> FileRecord | None:
        """The file, or None: unknown, deleted, expired or another tenant's."""
        with self._read() as connection:
            record = file_of(connection, file_id, tenant)
        return None if record is None or record.state in GONE or _is_due(record) else record

    def find(self, file_ids: Sequence[str], tenant: str) -> dict[str, Found]:
        """Some of a tenant's files with their adapters, by id, in one query; those that `file` would not give are
        absent."""
        found = {}
        with self._read() as connection:
            for start in range(0, len(file_ids), _PARAMETERS):
                asked = {"tenant": tenant, "ids": list(file_ids[start : start + _PARAMETERS])}
                for row in connection.execute(_FIND, asked):
                    record = file_record(row[: len(files.c)])
                    if record.state not in GONE and not _is_due(record):
                        adapter = row[len(files.c) :]
                        found[record.id] = Found(record, None if adapter[0] is None else adapter_record(adapter))
        return found

    def files(
        self, tenant: str, *, after: str | None, limit: int, descending: bool, purpose: str | None = None
    ) -> tuple[list[FileRecord], bool]:
        """One page of a tenant's files in upload order, and whether more follow.

        Raises:
            KeyError: `after` names no file of this tenant.
        """
        query = select(files).where(files.c.tenant == tenant, files.c.state.in_(LIVE), _not_due())
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._read() as connection:
            if after is not None:
                cursor = file_of(connection, after, tenant)
                if cursor is None:
                    raise KeyError(after)
                edge = cursor.number
                query = query.where(files.c.number < edge if descending else files.c.number > edge)
            order = files.c.number.desc() if descending else files.c.number
            rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
        return [file_record(row) for row in rows[:limit]], len(rows) > limit

    def states(self, file_ids: Collection[str]) -> dict[str, VideoState]:
        """The states of these files; unknown ids are absent."""
        asked = list(file_ids)
        found: dict[str, VideoState] = {}
        with self._read() as connection:
            for start in range(0, len(asked), _PARAMETERS):
                query = select(files.c.id, files.c.state).where(files.c.id.in_(asked[start : start + _PARAMETERS]))
                found |= {row.id: VideoState(row.state) for row in connection.execute(query)}
        return found

    def has_video(self, sha256: str) -> bool:
        """Whether any live file has these bytes."""
        with self._read() as connection:
            query = select(files.c.id).where(files.c.sha256 == sha256, files.c.state.in_(LIVE)).limit(1)
            return connection.scalar(query) is not None

    def videos_in_work(self) -> set[str]:
        """The sha-256 of every video that a job is about."""
        with self._read() as connection:
            return set(connection.scalars(select(jobs.c.sha256)))

    def pin_file(self, file_id: str, tenant: str, pinned: bool) -> FileRecord | None:
        """Keep a file from expiring, or let it expire again; None when there is no such file."""
        with self._write() as connection:
            record = file_of(connection, file_id, tenant)
            if record is None or record.state in GONE or _is_due(record):
                return None
            connection.execute(update(files).where(files.c.id == file_id).values(pinned=pinned))
            return file_of(connection, file_id, tenant)

    def touch(self, used_files: Mapping[str, float], used_adapters: Mapping[str, float]) -> None:
        """Note when files (by id) and adapters (by name) were last used; what expires by disuse lives on from then."""
        with self._write() as connection:
            if used_files:
                moment = bindparam("moment", type_=files.c.last_used_at.type)
                idle = (files.c.idle_seconds.isnot(None), moment + files.c.idle_seconds)
                expires_at = case(idle, else_=files.c.expires_at)
                chosen = update(files).where(files.c.id == bindparam("used"))
                rows = [{"used": file_id, "moment": at} for file_id, at in sorted(used_files.items())]
                connection.execute(chosen.values(last_used_at=moment, expires_at=expires_at), rows)
            if used_adapters:
                chosen = update(adapters).where(adapters.c.name == bindparam("used"))
                rows = [{"used": name, "moment": at} for name, at in sorted(used_adapters.items())]
                connection.execute(chosen.values(last_used_at=bindparam("moment")), rows)

    def remove_file(self, file_id: str, tenant: str) -> Removal | None:
        """Delete a file id; None when there is no such file. Its queued job goes too if nobody else waits for it."""
        with self._write() as connection:
            record = file_of(connection, file_id, tenant)
            if record is None or record.state in GONE:
                return None
            return _remove(connection, record, VideoState.DELETED)

    def expire_files(self, now: float) -> list[Removal]:
        """Expire every file whose time has come, unless it is pinned."""
        due = select(files).where(files.c.expires_at <= now, files.c.state.in_(LIVE), files.c.pinned.is_(False))
        with self._read() as connection:
            if connection.execute(due.limit(1)).first() is None:
                return []
        with self._write() as connection:
            return [_remove(connection, file_record(row), VideoState.EXPIRED) for row in connection.execute(due).all()]

    def purge(self, before: float) -> int:
        """Forget the rows of files that were deleted or expired before this moment. Returns how many."""
        with self._write() as connection:
            over = and_(files.c.state.in_([state.value for state in GONE]), files.c.ended_at < before)
            return connection.execute(delete(files).where(over)).rowcount

    # Adapters

    def adapter(self, name: str) -> AdapterRecord | None:
        """The published adapter of this name, or None."""
        with self._read() as connection:
            return adapter_of(connection, name)

    def adapters_of(self, records: Collection[FileRecord]) -> dict[str, AdapterRecord]:
        """The published adapters of these files, by name."""
        names = sorted({record.adapter_name for record in records if record.state is VideoState.PROCESSED})
        found: dict[str, AdapterRecord] = {}
        with self._read() as connection:
            for start in range(0, len(names), _PARAMETERS):
                query = select(adapters).where(adapters.c.name.in_(names[start : start + _PARAMETERS]))
                found |= {row.name: adapter_record(row) for row in connection.execute(query)}
        return found

    def recent_adapters(self, limit: int) -> list[AdapterRecord]:
        """The adapters of ready files, pinned first, then those used last (or made last), at most `limit`."""
        of_file = and_(files.c.adapter_name == adapters.c.name, files.c.state == VideoState.PROCESSED)
        pinned = exists().where(of_file, files.c.pinned.is_(True))
        used = func.coalesce(adapters.c.last_used_at, adapters.c.created_at)
        first = case((pinned, 1), else_=0).desc()
        query = select(adapters).where(exists().where(of_file)).order_by(first, used.desc()).limit(limit)
        with self._read() as connection:
            return [adapter_record(row) for row in connection.execute(query)]

    def pinned_adapters(self) -> set[str]:
        """The names of the adapters that pinned files answer from."""
        query = select(files.c.adapter_name).where(files.c.pinned.is_(True), files.c.state == VideoState.PROCESSED)
        with self._read() as connection:
            return set(connection.scalars(query.distinct()))

    def newest_adapter(self) -> int:
        """The largest id of an adapter; 0 without one."""
        with self._read() as connection:
            return connection.scalar(select(func.max(adapters.c.id))) or 0

    def adapters_after(self, number: int, limit: int) -> list[AdapterRecord]:
        """Adapters with ids above this one, in their order, at most `limit`."""
        query = select(adapters).where(adapters.c.id > number).order_by(adapters.c.id).limit(limit)
        with self._read() as connection:
            return [adapter_record(row) for row in connection.execute(query)]

    def forget_adapter(self, adapter: AdapterRecord) -> None:
        """An adapter was found missing or damaged: its files wait again, for a new job under the same name.

        Nothing happens when it is forgotten already, or made again meanwhile. A composed one is only forgotten.
        """
        name = adapter.name
        with self._write() as connection:
            if connection.execute(delete(adapters).where(adapters.c.id == adapter.id)).rowcount == 0:
                return
            waiting = [record for record in files_of(connection, name) if record.state is VideoState.PROCESSED]
            if waiting:
                ensure_job(connection, name, waiting[0].sha256, None)
            move(connection, waiting, VideoState.UPLOADED)
            if adapter.composed:
                connection.execute(delete(parts).where(parts.c.composed == name))

    def drop_abandoned(self) -> list[AdapterRecord]:
        """Take out adapters that no file refers to: those of other revisions, once their successors are made."""
        named = or_(files.c.adapter_name == adapters.c.name, files.c.previous_adapter == adapters.c.name)
        kept = exists().where(named, files.c.state.in_(LIVE))
        query = select(adapters.c.name).where(adapters.c.composed.is_(False), ~kept)
        with self._read() as connection:
            names = list(connection.scalars(query))
        if not names:
            return []
        with self._write() as connection:
            return drop_unwanted(connection, names)

    # Composed adapters

    def add_composed(
        self, name: str, made_of: Sequence[str], *, rank: int, size: int, info: dict[str, Any]
    ) -> AdapterRecord | None:
        """Enter an adapter composed of others; it leaves with the first of them. The one there is, if there is one.

        None when a part has left the catalog meanwhile.

        Raises:
            AdapterIdsExhausted: there is no int32 id left.
        """
        with self._write() as connection:
            found = adapter_of(connection, name)
            if found is not None:
                return found
            names = sorted(set(made_of))
            there = select(func.count()).select_from(adapters).where(adapters.c.name.in_(names))
            if connection.scalar(there) != len(names):
                return None
            record = insert_adapter(
                connection, {"name": name, "rank": rank, "bytes": size, "info": info, "composed": True}
            )
            connection.execute(insert(parts), [{"composed": name, "part": part} for part in names])
            return record

    def oldest_composed(self, keep: int) -> list[AdapterRecord]:
        """The composed adapters beyond the `keep` used (or made) last, which may be removed."""
        used = func.coalesce(adapters.c.last_used_at, adapters.c.created_at)
        query = select(adapters).where(adapters.c.composed.is_(True)).order_by(used.desc()).offset(keep)
        with self._read() as connection:
            return [adapter_record(row) for row in connection.execute(query)]

    def remove_composed(self, name: str) -> list[AdapterRecord]:
        """Take a composed adapter out, with what is composed of it; the records of all of them."""
        with self._write() as connection:
            found = adapter_of(connection, name)
            return drop_adapters(connection, [name]) if found is not None and found.composed else []

    def counts(self) -> tuple[dict[str, int], int, int]:
        """Files by state, jobs waiting, jobs running."""
        with self._read() as connection:
            by_state = select(files.c.state, func.count()).where(files.c.state.in_(LIVE)).group_by(files.c.state)
            states = {row[0]: row[1] for row in connection.execute(by_state)}
            by_running = select(jobs.c.running, func.count()).group_by(jobs.c.running)
            running = {row[0]: row[1] for row in connection.execute(by_running)}
        return states, running.get(0, 0), running.get(1, 0)


def _is_due(record: FileRecord) -> bool:
    return not record.pinned and record.expires_at is not None and record.expires_at <= time.time()


def _not_due() -> Any:
    return or_(files.c.pinned, files.c.expires_at.is_(None), files.c.expires_at > time.time())


def _remove(connection: Connection, record: FileRecord, state: VideoState) -> Removal:
    move(connection, [record], state)
    dropped = drop_unwanted(connection, [record.adapter_name, record.previous_adapter])
    same_bytes = exists().where(files.c.sha256 == record.sha256, files.c.state.in_(LIVE))
    return Removal(record, dropped, orphaned_video=not connection.scalar(select(same_bytes)))
