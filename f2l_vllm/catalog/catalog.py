"""The catalog: which files exist, which adapter answers for each, and which adapters still have to be made.

It is the only authority on a video's state; servers and pools in any number of processes share it. Every method is one
transaction. It raises `Unavailable` and changes nothing when the database is busy, full or away.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from f2l_vllm.catalog.adapters import Published
from f2l_vllm.catalog.batches import Batches
from f2l_vllm.catalog.duties import Duties
from f2l_vllm.catalog.jobs import Jobs
from f2l_vllm.catalog.keys import Keys
from f2l_vllm.catalog.revisions import Adoption
from f2l_vllm.catalog.servers import Servers
from f2l_vllm.catalog.states import GONE, IN_WORK, LIVE, VideoState
from f2l_vllm.catalog.streams import Streams
from f2l_vllm.catalog.tables import (
    IS_VIDEO,
    Bytes,
    FileRecord,
    FileWithAdapter,
    Tombstone,
    Upload,
    adapters,
    files,
    jobs,
    tombstones,
    usage,
)
from f2l_vllm.catalog.tombstones import Tombstones, give_back, name_video
from f2l_vllm.catalog.transactions import (
    NOTHING_TO_MAKE,
    QueueFull,
    QuotaExceeded,
    adapter_record,
    count_bytes,
    end_file,
    ensure_job,
    file_of,
    file_of_address,
    file_record,
    standing,
)
from f2l_vllm.catalog.uploads import Uploads
from f2l_vllm.catalog.watches import Watches

__all__ = ["Catalog", "QueueFull", "QuotaExceeded", "Removal"]

_PARAMETERS = 500  # databases bound the number of parameters
_AT_ONCE = 200  # rows that one transaction ends: other writers wait for it
# Every question runs this query. It is built once: building the statement takes longer than running it.
_OF_FILE = and_(adapters.c.name == files.c.adapter_name, files.c.state == VideoState.PROCESSED)
_FIND = (
    select(files, adapters)
    .outerjoin(adapters, _OF_FILE)
    .where(files.c.tenant == bindparam("tenant"), files.c.id.in_(bindparam("ids", expanding=True)))
)

_ENTER_FILE = insert(files).returning(files)


@dataclass(frozen=True)
class Removal:
    """A file that left the catalog, and what has to be removed from the store because of it."""

    file: FileRecord
    doomed: list[Tombstone]

    @property
    def orphaned_adapters(self) -> list[Tombstone]:
        """The adapters to remove."""
        return [one for one in self.doomed if not one.is_video]

    @property
    def orphaned_video(self) -> bool:
        """Whether the video's bytes have to be removed."""
        return any(one.is_video for one in self.doomed)


class Catalog(Adoption, Batches, Duties, Jobs, Keys, Published, Servers, Streams, Tombstones, Uploads, Watches):
    """Files, adapters, jobs and keys in one database."""

    # Files

    def add_file(
        self,
        upload: Upload,
        adapter_name: str,
        *,
        queue_limit: int,
        tenant_limit: int | None = None,
        tenant_bytes: int | None = None,
        job_attempts: int = 1,
        video: Bytes | None = None,
    ) -> FileRecord:
        """Enter a file. It is ready at once if its adapter exists, else it waits for the adapter's job.

        Args:
            adapter_name: empty for a document.
            tenant_bytes: how many bytes all files of a tenant may hold.
            video: where the bytes are, from `reserve_video`; None: under their plain hash, and nobody deletes them
                meanwhile.

        Raises:
            QueueFull: the adapter needs a new job, and `queue_limit` jobs, or `tenant_limit` jobs for this tenant,
                wait already.
            QuotaExceeded: the tenant would have more than `tenant_bytes`.
            VideoGone: the bytes were deleted meanwhile.
            OtherModels: files are answered by servers of another revision. In all cases nothing is entered.
        """
        self._check_room()
        with self._write(beside=[upload.sha256]) as connection:
            if upload.from_address:
                known = file_of_address(connection, upload.tenant, upload.sha256)
                if known is not None and known.id != upload.instead_of and not self._is_due(known):
                    if video is not None:
                        give_back(connection, video)
                    return known
                if known is not None:
                    connection.execute(update(files).where(files.c.id == known.id).values(from_address=False))
            if upload.file_id is not None and (known := file_of(connection, upload.file_id, upload.tenant)) is not None:
                if video is not None:
                    give_back(connection, video)
                return known
            generation = "" if video is None else name_video(connection, video)
            found = standing(connection, adapter_name, self.revision) if adapter_name else NOTHING_TO_MAKE
            ready = found.is_published
            now = self.now()
            values = {
                "id": upload.file_id or f"file-{secrets.token_hex(12)}",
                "tenant": upload.tenant,
                "filename": upload.filename,
                "purpose": upload.purpose,
                "bytes": upload.bytes,
                "sha256": upload.sha256,
                "adapter_name": adapter_name,
                "state": VideoState.PROCESSED if ready else VideoState.UPLOADED,
                "progress": 1.0 if ready else 0.0,
                "created_at": now,
                "expires_at": None if upload.expires_seconds is None else now + upload.expires_seconds,
                "idle_seconds": upload.idle_seconds,
                "pinned": upload.pinned,
                "generation": generation,
                "from_address": upload.from_address,
            }
            row = connection.execute(_ENTER_FILE, values).one()
            # Late: from here on the tenant's other uploads wait, and others that need a job.
            count_bytes(connection, upload.tenant, upload.bytes, tenant_bytes, hold=found.queue(queue_limit))
            ensure_job(
                connection,
                adapter_name,
                upload.sha256,
                found,
                job_attempts=job_attempts,
                queue_limit=queue_limit,
                tenant=upload.tenant,
                tenant_limit=tenant_limit,
                trace=upload.trace,
                background=upload.background,
            )
            return file_record(row)

    def file(self, file_id: str, tenant: str) -> FileRecord | None:
        """The file; None if it is unknown, deleted, expired or another tenant's."""
        with self._read() as connection:
            record = file_of(connection, file_id, tenant)
        return None if record is None or record.state in GONE or self._is_due(record) else record

    def file_of_address(self, tenant: str, sha256: str) -> FileRecord | None:
        """The tenant's file with these bytes that was named by an address, if there is one."""
        with self._read() as connection:
            record = file_of_address(connection, tenant, sha256)
        return None if record is None or self._is_due(record) else record

    def find(self, file_ids: Sequence[str], tenant: str) -> dict[str, FileWithAdapter]:
        """Some of a tenant's files with their adapters, by id, in one query. A file for which `file` returns None is
        absent."""
        found = {}
        with self._read() as connection:
            for start in range(0, len(file_ids), _PARAMETERS):
                asked = {"tenant": tenant, "ids": list(file_ids[start : start + _PARAMETERS])}
                for row in connection.execute(_FIND, asked):
                    record = file_record(row[: len(files.c)])
                    if record.state not in GONE and not self._is_due(record):
                        adapter = row[len(files.c) :]
                        found[record.id] = FileWithAdapter(
                            record, None if adapter[0] is None else adapter_record(adapter)
                        )
        return found

    def files(
        self,
        tenant: str,
        *,
        after: str | None,
        limit: int,
        descending: bool,
        purpose: str | None = None,
        state: VideoState | None = None,
    ) -> tuple[list[FileRecord], bool]:
        """One page of a tenant's files in upload order, and whether more follow. `state` keeps only videos in it.

        Raises:
            KeyError: `after` names no file of this tenant.
        """
        of_state = files.c.state.in_(LIVE) if state is None else and_(files.c.state == state, IS_VIDEO)
        query = select(files).where(files.c.tenant == tenant, of_state, self._not_due())
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
        return {file_id: state for file_id, (state, _) in self.progress(file_ids).items()}

    def progress(self, file_ids: Collection[str]) -> dict[str, tuple[VideoState, float]]:
        """State and progress of these files; unknown ids are absent."""
        asked = list(file_ids)
        found: dict[str, tuple[VideoState, float]] = {}
        columns = (files.c.id, files.c.state, files.c.progress)
        with self._read() as connection:
            for start in range(0, len(asked), _PARAMETERS):
                query = select(*columns).where(files.c.id.in_(asked[start : start + _PARAMETERS]))
                found |= {row.id: (VideoState(row.state), row.progress) for row in connection.execute(query)}
        return found

    def in_work(self, tenant: str, since: int | None, limit: int) -> tuple[dict[str, tuple[VideoState, float]], int]:
        """State and progress of a tenant's videos that are in work or were uploaded after the file number `since`, and
        the number of the last upload. At most `limit` of each; `since` None: only those in work."""
        columns = (files.c.id, files.c.number, files.c.state, files.c.progress)
        own = select(*columns).where(files.c.tenant == tenant, IS_VIDEO)
        queries = [own.where(files.c.state.in_(list(IN_WORK))).order_by(files.c.number).limit(limit)]
        if since is None:
            newest = select(func.max(files.c.number)).where(files.c.tenant == tenant)
        else:
            queries.append(own.where(files.c.number > since).order_by(files.c.number).limit(limit))
        with self._read() as connection:
            if since is None:
                since = int(connection.scalar(newest) or 0)
            rows = [row for query in queries for row in connection.execute(query)]
        last = max((row.number for row in rows), default=since)
        return {row.id: (VideoState(row.state), row.progress) for row in rows}, max(last, since)

    def stored_bytes(self, tenant: str | None = None) -> int:
        """How many bytes a tenant's files hold; without a tenant, all files."""
        query = select(func.sum(usage.c.bytes))
        with self._read() as connection:
            return int(connection.scalar(query if tenant is None else query.where(usage.c.tenant == tenant)) or 0)

    def videos_in_work(self) -> set[str]:
        """The sha-256 of every video that has a job."""
        with self._read() as connection:
            return set(connection.scalars(select(jobs.c.sha256)))

    def pin_file(self, file_id: str, tenant: str, pinned: bool) -> FileRecord | None:
        """Keep a file from expiring, or let it expire again; None if there is no such file."""
        with self._write() as connection:
            record = file_of(connection, file_id, tenant)
            if record is None or record.state in GONE or self._is_due(record):
                return None
            connection.execute(update(files).where(files.c.id == file_id).values(pinned=pinned))
            return file_of(connection, file_id, tenant)

    def touch(self, used_files: Mapping[str, float], used_adapters: Mapping[str, float]) -> None:
        """Note when files (by id) and adapters (by name) were last used. Idle time before expiry counts from then."""
        with self._write(beside=()) as connection:
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
        """Delete a file id; None if there is no such file. Its queued job goes too if nobody else waits for it."""
        with self._read() as connection:
            known = file_of(connection, file_id, tenant)
        if known is None:
            return None
        with self._write(beside=[known.sha256], deletes=True) as connection:
            record = file_of(connection, file_id, tenant, hold=True)
            if record is None or record.state in GONE:
                return None
            return Removal(record, end_file(connection, record, VideoState.DELETED))

    def expire_files(self, now: float, limit: int = _AT_ONCE) -> list[Removal]:
        """Expire at most `limit` files that are due and not pinned, in one transaction."""
        due = select(files).where(files.c.expires_at <= now, files.c.state.in_(LIVE), files.c.pinned.is_(False))
        with self._read() as connection:
            rows = connection.execute(due.order_by(files.c.expires_at).limit(limit)).all()
        if not rows:
            return []
        with self._write(beside=[row.sha256 for row in rows], deletes=True) as connection:
            still = due.where(files.c.number.in_([row.number for row in rows])).order_by(files.c.id)
            held = connection.execute(still.with_for_update()).all()
            records = [file_record(row) for row in held]
            return [Removal(record, end_file(connection, record, VideoState.EXPIRED)) for record in records]

    def purge(self, before: float) -> int:
        """Delete the rows of files that were deleted or expired before this moment, and the tombstones that were done
        before it. Returns the number of files."""
        over = and_(files.c.state.in_([state.value for state in GONE]), files.c.ended_at < before)
        forgotten = self._forget(files.c.number, over)
        self._forget(tombstones.c.seq, tombstones.c.done_at < before)
        return forgotten

    def _forget(self, number: Column[Any], chosen: ColumnElement[bool]) -> int:
        """Delete rows, `_AT_ONCE` in each transaction; returns how many."""
        forgotten = 0
        while True:
            with self._read() as connection:
                numbers = list(connection.scalars(select(number).where(chosen).limit(_AT_ONCE)))
            if not numbers:
                return forgotten
            with self._write(beside=()) as connection:
                forgotten += connection.execute(delete(number.table).where(number.in_(numbers))).rowcount

    def _is_due(self, record: FileRecord) -> bool:
        return not record.pinned and record.expires_at is not None and record.expires_at <= self.now()

    def _not_due(self) -> ColumnElement[bool]:
        return or_(files.c.pinned, files.c.expires_at.is_(None), files.c.expires_at > self.now())

    def counts(self) -> tuple[dict[str, int], int, int]:
        """Videos by state, jobs waiting, jobs running."""
        by_state = select(files.c.state, func.count()).where(files.c.state.in_(LIVE), IS_VIDEO).group_by(files.c.state)
        with self._read() as connection:
            states = {row[0]: row[1] for row in connection.execute(by_state)}
        return states, *self.jobs()
