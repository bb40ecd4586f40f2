"""The revision of model, hypernetwork and sampling that a catalog's files are answered with, and its change.

All adapters of a catalog are made and used by servers of one revision. A server of another one waits until no server
of the present revision runs, or until an operator appoints its own. Then it brings the files to its revision: they
become ready, wait for new adapters, or fail.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Connection, bindparam, delete, exists, func, insert, select, update

from f2l_vllm.catalog.database import Database, clock, moment
from f2l_vllm.catalog.servers import SERVER_SECONDS
from f2l_vllm.catalog.states import GONE, LIVE, VideoState
from f2l_vllm.catalog.tables import IS_VIDEO, FileRecord, adapters, files, jobs, servers, serving, usage
from f2l_vllm.catalog.transactions import PRESENT, drop_jobs, file_record, move

OTHER_REVISION = "adapter_of_other_revision"
_NO_BYTES = "Its adapter was made with another model, hypernetwork or sampling, and its bytes are no longer stored."
_DETAILS: dict[VideoState, dict[str, Any]] = {  # what a file has in the state that it moves to
    VideoState.PROCESSED: {"progress": 1.0, "error_code": None, "error_message": None},
    VideoState.UPLOADED: {},
    VideoState.ERROR: {"error_code": OTHER_REVISION, "error_message": _NO_BYTES},
}
_ADOPTED_AT_ONCE = 200
_LOOKS_AT_ONCE = 32  # calls to an object store


class Adoption(Database):
    """What a server does with its catalog before it answers, and while it begins to."""

    revision: str | None  # of this process

    def is_appointed(self, revision: str) -> bool:
        """Whether files are answered with this revision: it is appointed if no server of the present one runs."""
        with self._read() as connection:
            present = connection.scalar(PRESENT)
            if present == revision or _runs(connection, present):
                return present == revision
        with self._write() as connection:
            present = connection.scalar(PRESENT)
            if present != revision and not _runs(connection, present):
                _appoint(connection, revision)
                return True
            return present == revision

    def appoint(self, revision: str) -> None:
        """From now on servers of this revision answer, and no others."""
        with self._write() as connection:
            _appoint(connection, revision)

    def revisions(self) -> tuple[str | None, dict[str, int]]:
        """The present revision, and how many servers of each revision run."""
        with self._read() as connection:
            running = servers.c.seen_at >= clock(connection) - SERVER_SECONDS
            rows = connection.execute(
                select(servers.c.revision, func.count()).where(running).group_by(servers.c.revision)
            )
            return connection.scalar(PRESENT), {row[0]: row[1] for row in rows}

    def adopt(self, name_of: Callable[[str], str], has_video: Callable[[str], bool]) -> tuple[int, int]:
        """Bring every file to the present revisions of model, hypernetwork and sampling. Returns how many files wait
        and how many failed.

        A file whose adapter's name is not `name_of(sha256)` is never answered from that adapter. It is ready if the
        adapter of the right name exists. Otherwise it waits for a background job that makes that adapter from the
        stored bytes; files used last come first. Without bytes it fails with `adapter_of_other_revision`. The old
        adapter stays until the new one is ready, so that a start with the wrong models loses nothing.

        Files move in small transactions, beside those of other servers, until another revision is appointed.

        Args:
            name_of: the adapter's name for a sha-256.
            has_video: whether the store has the bytes of this name. Called from several threads.
        """
        self._count_bytes_again()
        used = func.coalesce(files.c.last_used_at, files.c.created_at)
        query = select(files).where(files.c.state.in_(LIVE), IS_VIDEO).order_by(used.desc())
        with self._read() as connection:
            rows = connection.execute(query)
            stale = [file_record(row) for row in rows if name_of(row.sha256) != row.adapter_name]
        waiting = failed = 0
        with ThreadPoolExecutor(_LOOKS_AT_ONCE, "f2l-adopt") as threads:
            for start in range(0, len(stale), _ADOPTED_AT_ONCE):
                chosen = stale[start : start + _ADOPTED_AT_ONCE]
                stored = dict(zip(chosen, threads.map(has_video, [record.video for record in chosen]), strict=True))
                with self._write(beside=[record.sha256 for record in chosen], deletes=True) as connection:
                    if self.revision is not None and connection.scalar(PRESENT) != self.revision:
                        break  # another one was appointed meanwhile, whose servers bring the files to theirs
                    of_ids = select(files).where(files.c.id.in_([record.id for record in chosen]))
                    held = connection.execute(of_ids.order_by(files.c.id).with_for_update())
                    present = {record.id: record for record in map(file_record, held)}
                    # In the order of their use, in which their jobs will wait.
                    left = [present[record.id] for record in chosen if record.id in present]
                    names = {record.id: name_of(record.sha256) for record in left}
                    states = _adopt(connection, left, names, {record.id for record in chosen if stored[record]})
                    waiting += states.count(VideoState.UPLOADED)
                    failed += states.count(VideoState.ERROR)
        return waiting, failed

    def _count_bytes_again(self) -> None:
        """Recount: earlier versions, which did not count bytes, may have written to this catalog."""
        kept = select(files.c.tenant, func.sum(files.c.bytes)).where(files.c.state.in_(LIVE)).group_by(files.c.tenant)
        with self._write() as connection:
            connection.execute(delete(usage))
            connection.execute(insert(usage).from_select(["tenant", "bytes"], kept))


def _runs(connection: Connection, revision: str | None) -> bool:
    """Whether a server of this revision gives signs of life."""
    since = clock(connection) - SERVER_SECONDS
    running = exists().where(servers.c.revision == revision, servers.c.seen_at >= since)
    return bool(connection.scalar(select(running)))


def _appoint(connection: Connection, revision: str) -> None:
    connection.execute(delete(serving))
    connection.execute(insert(serving).values(id=1, revision=revision))


def _adopt(
    connection: Connection, records: Sequence[FileRecord], names: Mapping[str, str], stored: Collection[str]
) -> list[VideoState]:
    """Give files the adapter names of the present revisions. Returns the states of those that changed.

    Args:
        names: the adapters' names, by file id.
        stored: ids of files whose bytes the store has.
    """
    asked = {*names.values(), *(record.adapter_name for record in records)}
    made = set(connection.scalars(select(adapters.c.name).where(adapters.c.name.in_(asked))))
    moved: dict[VideoState, list[FileRecord]] = {state: [] for state in _DETAILS}
    for record in records:
        ready = names[record.id] in made
        if (
            record.state in GONE
            or record.adapter_name == names[record.id]
            or (record.state is VideoState.ERROR and not ready)
        ):
            continue
        state = VideoState.UPLOADED if record.id in stored else VideoState.ERROR
        moved[VideoState.PROCESSED if ready else state].append(record)
    for state, group in moved.items():
        move(connection, [record for record in group if record.state is not state], state, **_DETAILS[state])
    _enter_jobs(connection, {names[record.id]: record.sha256 for record in moved[VideoState.UPLOADED]})
    changed = [record for group in moved.values() for record in group]
    if not changed:
        return []
    values = []
    for record in changed:
        name, old = names[record.id], record.adapter_name
        previous = old if old in made else record.previous_adapter
        values.append({"file": record.id, "adapter": name, "previous": None if previous == name else previous})
    rename = update(files).where(files.c.id == bindparam("file"))
    named: dict[str, Any] = {"adapter_name": bindparam("adapter"), "previous_adapter": bindparam("previous")}
    connection.execute(rename.values(named), sorted(values, key=lambda row: str(row["file"])))
    olds = {record.adapter_name for record in changed}
    used = select(files.c.adapter_name).where(files.c.adapter_name.in_(olds), files.c.state.in_(LIVE)).distinct()
    drop_jobs(connection, jobs.c.adapter_name.in_(olds - set(connection.scalars(used))))
    return [state for state, group in moved.items() for _ in group]


def _enter_jobs(connection: Connection, wanted: Mapping[str, str]) -> None:
    """Enter background jobs for these adapters, by name, with the hashes of their videos, unless they have one."""
    known = set(connection.scalars(select(jobs.c.adapter_name).where(jobs.c.adapter_name.in_(wanted))))
    common = {"running": 0, "attempts": 0, "background": True, "created_at": moment(connection)}
    rows = [{**common, "adapter_name": name, "sha256": sha} for name, sha in wanted.items() if name not in known]
    if rows:
        connection.execute(insert(jobs), rows)
