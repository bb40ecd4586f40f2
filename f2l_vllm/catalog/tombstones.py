"""Tombstones: what has to be removed from the store. Deleting a row writes its tombstone in the same transaction.

The bytes of a video are stored under their hash and a *generation*. All live files with the same bytes name the same
generation. A generation begins as a reservation: an upload asks for it and puts the bytes there, and entering the file
ends the reservation. The deletion of the last file that names the generation writes a tombstone. The generation is
never named again; the next upload of the same bytes gets another one. So any server may remove what a tombstone names,
at any time and more than once, whatever other servers upload meanwhile: after a crash, after the store was away, or as
the server that deleted the file.

An unused reservation, whose upload was refused or whose server is gone, becomes a tombstone by itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, delete, exists, func, insert, or_, select, update

from f2l_vllm.catalog.database import Database, clock, moment, now, write_tombstones
from f2l_vllm.catalog.states import LIVE
from f2l_vllm.catalog.tables import ADAPTER, LATE, VIDEO, Bytes, Tombstone, adapters, files, jobs, tombstones
from f2l_vllm.store.address import object_name

LOST = "video_lost"  # the error of a file whose bytes a worker found missing or changed
_RESERVED_SECONDS = 3600.0  # an upload that takes longer to put its bytes into the store begins again
_LATE_SECONDS = 600.0  # for so long an attempt that was given up is watched; then the sweep of the store finds it
_AT_ONCE = 500  # databases bound the number of parameters

# Every upload runs these queries. They are built once: building a statement takes longer than running it.
_SAME_BYTES = and_(files.c.sha256 == bindparam("sha256"), files.c.state.in_(LIVE))
_LIVE_GENERATION = select(files.c.generation).where(_SAME_BYTES).limit(1)
_ARE_MISSING = or_(~exists(_LIVE_GENERATION), exists().where(_SAME_BYTES, files.c.error_code == LOST))
_RESERVED = tuple(tombstones.c[name] for name in ("kind", "name", "generation", "doomed_at", "reserved"))
_RESERVATION = select(*(bindparam(column.name, type_=column.type) for column in _RESERVED))
_RESERVE = insert(tombstones).from_select(_RESERVED, _RESERVATION)
_RESERVE_IF_MISSING = (
    insert(tombstones)
    .from_select(_RESERVED, _RESERVATION.where(_ARE_MISSING))
    .returning(_LIVE_GENERATION.scalar_subquery())
)
_IS_RESERVATION = and_(
    tombstones.c.kind == VIDEO,
    tombstones.c.name == bindparam("sha256"),
    tombstones.c.generation == bindparam("generation"),
    tombstones.c.reserved.is_(True),
)
_END_RESERVATION = delete(tombstones).where(_IS_RESERVATION)
_END_ONLY_RESERVATION = _END_RESERVATION.where(~exists(_LIVE_GENERATION))


class VideoGone(RuntimeError):
    """The bytes that an upload relied on were deleted meanwhile."""


class Tombstones(Database):
    """What uploads, deletions and the removal of files from the store agree on."""

    def reserve_video(self, sha256: str, *, anew: bool = False, replaces: str | None = None) -> Bytes:
        """Where an upload finds these bytes, or has to put them.

        Args:
            anew: the upload stores them itself, even if they are stored already.
            replaces: with `anew`, the generation whose bytes were found missing or cut short.
        """
        generation = secrets.token_hex(8)
        self._check_room()
        values = {"kind": VIDEO, "name": sha256, "generation": generation, "reserved": True}
        with self._append() as connection:
            values["doomed_at"] = moment(connection)
            if anew:
                connection.execute(_RESERVE, values)
                return Bytes(sha256, generation, is_new=True, replaces=replaces)
            while True:
                reserved = connection.execute(_RESERVE_IF_MISSING, {**values, "sha256": sha256}).first()
                if reserved is not None:
                    return Bytes(sha256, generation, is_new=True, replaces=reserved[0])
                live: str | None = connection.scalar(_LIVE_GENERATION, {"sha256": sha256})
                if live is not None:
                    return Bytes(sha256, live, is_new=False)

    def give_back_video(self, video: Bytes) -> list[Tombstone]:
        """End the reservation of a file that was not entered: its bytes may be removed unless a file names them."""
        with self._write(beside=[video.sha256]) as connection:
            return give_back(connection, video)

    def tombstones(self, limit: int) -> list[Tombstone]:
        """What has to be removed from the store, oldest first, at most `limit`."""
        open_ = tombstones.c.done_at.is_(None)
        with self._read() as connection:
            before = clock(connection) - _RESERVED_SECONDS
            late = and_(tombstones.c.reserved.is_(True), tombstones.c.doomed_at < before)
            is_late = connection.scalar(select(exists().where(open_, late)))
        if is_late:
            with self._write(deletes=True) as connection:
                ended = delete(tombstones).where(open_, late).returning(tombstones.c.name, tombstones.c.generation)
                doom(connection, VIDEO, [(name, generation) for name, generation in connection.execute(ended)])
        with self._read() as connection:
            query = select(tombstones).where(open_, tombstones.c.reserved.is_(False)).order_by(tombstones.c.seq)
            return [tombstone_record(row) for row in connection.execute(query.limit(limit))]

    def leftovers(self) -> tuple[int, float]:
        """How many tombstones wait for the removal of what they name, and for how many seconds the oldest has."""
        waits = and_(tombstones.c.done_at.is_(None), tombstones.c.reserved.is_(False))
        with self._read() as connection:
            count, oldest = connection.execute(
                select(func.count(), func.min(tombstones.c.doomed_at)).where(waits)
            ).one()
            return count, 0.0 if oldest is None else max(0.0, clock(connection) - oldest)

    def bury(self, removed: Collection[Tombstone]) -> None:
        """Note that what these tombstones name is gone from the store. An attempt that still runs may put its adapter
        there later; its tombstone stays open."""
        runs = exists().where(jobs.c.adapter_name == tombstones.c.name, jobs.c.token == tombstones.c.generation)
        with self._write(beside=()) as connection:
            numbers = [tombstone.seq for tombstone in removed]
            for start in range(0, len(numbers), _AT_ONCE):
                chosen = tombstones.c.seq.in_(numbers[start : start + _AT_ONCE])
                connection.execute(update(tombstones).where(chosen, ~runs).values(done_at=now(connection)))

    def reopen_late(self) -> None:
        """Have the adapters of attempts that were given up lately removed once more, if they have come meanwhile."""
        done = and_(tombstones.c.kind == LATE, tombstones.c.done_at.is_not(None))
        with self._read() as connection:
            lately = and_(done, tombstones.c.doomed_at > clock(connection) - _LATE_SECONDS)
            if not connection.scalar(select(exists().where(lately))):
                return
        with self._write(beside=()) as connection:
            connection.execute(update(tombstones).where(lately).values(done_at=None))

    def named(self, names: Collection[str]) -> set[str]:
        """Those of these store names that a row names: adapters that are published or in the making, and videos of
        live files or of unfinished uploads."""
        asked, found = sorted(names), set()
        for start in range(0, len(asked), _AT_ONCE):
            found |= self._named(asked[start : start + _AT_ONCE])
        return found

    def _named(self, names: Sequence[str]) -> set[str]:
        stems = {name.partition(".")[0] for name in names}
        of_files = select(files.c.sha256, files.c.generation).where(files.c.state.in_(LIVE), files.c.sha256.in_(stems))
        reserved = select(tombstones.c.name, tombstones.c.generation).where(
            tombstones.c.reserved.is_(True), tombstones.c.name.in_(stems)
        )
        published = select(adapters.c.name, adapters.c.generation).where(adapters.c.name.in_(stems))
        in_work = select(jobs.c.adapter_name, func.coalesce(jobs.c.token, ""))
        in_work = in_work.where(jobs.c.running == 1, jobs.c.adapter_name.in_(stems))
        with self._read() as connection:
            queries = (of_files.distinct(), reserved, published, in_work)
            found = {object_name(*row) for query in queries for row in connection.execute(query)}
        return found & set(names)


def doom(connection: Connection, kind: str, objects: Iterable[tuple[str, str]]) -> list[Tombstone]:
    """Write tombstones for what no row names any more: names, each with its generation."""
    doomed = []
    for name, generation in objects:
        values = {"kind": kind, "name": name, "generation": generation, "doomed_at": now(connection)}
        (seq,) = connection.execute(insert(tombstones).values(values)).inserted_primary_key or (0,)
        doomed.append(Tombstone(seq, kind, name, generation))
    return doomed


def reopen(connection: Connection, adapter_name: str) -> None:
    """Have what was removed of an adapter removed once more: an attempt that was given up may have put its own into the
    store since then."""
    of_adapter = and_(tombstones.c.kind.in_((ADAPTER, LATE)), tombstones.c.name == adapter_name)
    buried = and_(of_adapter, tombstones.c.done_at.is_not(None))
    connection.execute(update(tombstones).where(buried).values(done_at=None))


def doom_video_unless_named(connection: Connection, sha256: str, generation: str) -> list[Tombstone]:
    """After a file has left, write a tombstone for its bytes if no live file has the same bytes."""
    same_bytes = exists().where(files.c.sha256 == sha256, files.c.state.in_(LIVE))
    return [] if connection.scalar(select(same_bytes)) else doom(connection, VIDEO, [(sha256, generation)])


def name_video(connection: Connection, video: Bytes) -> str:
    """The generation that a new file with these bytes names: that of existing files, or the upload's own.

    Raises:
        VideoGone: the upload relied on bytes that were deleted meanwhile; it has to store them itself.
    """
    is_first = video.is_new and video.replaces is None
    if is_first and connection.execute(_END_ONLY_RESERVATION, _of(video)).rowcount == 1:
        return video.generation
    live: str | None = connection.scalar(_LIVE_GENERATION, {"sha256": video.sha256})
    if not video.is_new:
        if live != video.generation:
            raise VideoGone
        return video.generation
    if live is not None and live != video.replaces:
        give_back(connection, video)
        return live
    if connection.execute(_END_RESERVATION, _of(video)).rowcount == 0:
        raise VideoGone
    if live is not None:
        same_bytes = and_(files.c.sha256 == video.sha256, files.c.state.in_(LIVE))
        connection.execute(select(files.c.id).where(same_bytes).order_by(files.c.id).with_for_update())
        connection.execute(update(files).where(same_bytes).values(generation=video.generation))
        write_tombstones(connection)
        doom(connection, VIDEO, [(video.sha256, live)])
    return video.generation


def give_back(connection: Connection, video: Bytes) -> list[Tombstone]:
    """End an unused reservation: its bytes may be removed. The tombstone gets a number of its own, because servers may
    have forgotten everything up to the reservation's."""
    write_tombstones(connection)
    if connection.execute(_END_RESERVATION, _of(video)).rowcount == 0:
        return []
    return doom(connection, VIDEO, [(video.sha256, video.generation)])


def _of(video: Bytes) -> dict[str, str]:
    return {"sha256": video.sha256, "generation": video.generation}


def tombstone_record(row: Row[Any]) -> Tombstone:
    """A row of `tombstones` as a record."""
    return Tombstone(row.seq, row.kind, row.name, row.generation)
