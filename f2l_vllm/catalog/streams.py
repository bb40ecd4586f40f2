"""Live streams: where their segments lie, which pieces there are of them, and what was asked of each segment.

A stream's row is locked while a segment of it is placed, so segments that two servers receive at once have one order.
Whatever else servers do to a stream is right if two do it at once: a piece has one row, by the id of its file.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from f2l_vllm.catalog.database import Database, moment
from f2l_vllm.catalog.placing import overlaps, place
from f2l_vllm.catalog.states import GONE, LIVE, VideoState
from f2l_vllm.catalog.stream_tables import (
    STREAM_PREFIX,
    PieceRecord,
    Span,
    StreamRecord,
    StreamState,
    pieces,
    streams,
    watch_answers,
    watches,
)
from f2l_vllm.catalog.tables import Tombstone, adapters, files
from f2l_vllm.catalog.transactions import adapter_record, end_file, file_record

_RECENT = 16  # pieces among which a segment that is sent again is known by its name
_BEHIND = STREAM_PREFIX[:-1] + chr(ord(STREAM_PREFIX[-1]) + 1)  # all ids of streams sort before this
LATE_SECONDS = 10.0  # for so long after its end a stream's last segments may still be on their way
_KEPT_SECONDS = 30 * 86400.0  # how long a stream that has ended is listed
_OF_PIECE = and_(files.c.id == pieces.c.file_id, files.c.state.in_(LIVE))
_OF_FILE = and_(adapters.c.name == files.c.adapter_name, files.c.state == VideoState.PROCESSED)
_PIECES = select(pieces, files, adapters).outerjoin(files, _OF_PIECE).outerjoin(adapters, _OF_FILE)
_ENTER = {
    name: kind.insert(pieces).on_conflict_do_nothing().returning(pieces.c.number)
    for name, kind in (("sqlite", sqlite), ("postgresql", postgresql))
}


class TooManyStreams(RuntimeError):
    """The tenant has as many live streams, or the stream as many watches, as there may be."""


class StreamEnded(RuntimeError):
    """No segment may come any more."""


class Streams(Database):
    """The streams of all tenants. Every method is one transaction."""

    def add_stream(self, tenant: str, values: dict[str, Any], *, limit: int) -> StreamRecord:
        """Enter a live stream.

        Raises:
            TooManyStreams: the tenant has `limit` live ones.
        """
        self._check_room()
        live = select(func.count()).where(streams.c.tenant == tenant, streams.c.state == StreamState.LIVE)
        with self._write() as connection:
            if (connection.scalar(live) or 0) >= limit:
                raise TooManyStreams
            name = f"{STREAM_PREFIX}{secrets.token_hex(12)}"
            own = {"id": name, "tenant": tenant, "state": StreamState.LIVE, "created_at": moment(connection)}
            return stream_record(connection.execute(insert(streams).returning(streams), {**values, **own}).one())

    def stream(self, stream_id: str, tenant: str) -> StreamRecord | None:
        """A tenant's stream; None if there is no such stream."""
        with self._read() as connection:
            return _find(connection, stream_id, tenant)

    def streams(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[StreamRecord], bool]:
        """One page of a tenant's streams, newest first, and whether more follow.

        Raises:
            KeyError: `after` names no stream of this tenant.
        """
        query = select(streams).where(streams.c.tenant == tenant).order_by(streams.c.number.desc()).limit(limit + 1)
        with self._read() as connection:
            if after is not None:
                if (cursor := _find(connection, after, tenant)) is None:
                    raise KeyError(after)
                query = query.where(streams.c.number < cursor.number)
            rows = connection.execute(query).all()
        return [stream_record(row) for row in rows[:limit]], len(rows) > limit

    def live_streams(self, tenant: str) -> list[StreamRecord]:
        """A tenant's streams that are live, newest first."""
        live = and_(streams.c.tenant == tenant, streams.c.state == StreamState.LIVE)
        with self._read() as connection:
            rows = connection.execute(select(streams).where(live).order_by(streams.c.number.desc()))
            return [stream_record(row) for row in rows]

    def open_streams(self) -> list[StreamRecord]:
        """All tenants' streams that are live, or have ended and still have pieces."""
        has_pieces = select(pieces.c.stream).where(pieces.c.stream == streams.c.id).exists()
        query = select(streams).where((streams.c.state == StreamState.LIVE) | has_pieces).order_by(streams.c.number)
        with self._read() as connection:
            return [stream_record(row) for row in connection.execute(query)]

    def note_stream(self, stream: StreamRecord, **values: Any) -> None:
        """Set some columns of a stream."""
        with self._write(beside=()) as connection:
            connection.execute(update(streams).where(streams.c.number == stream.number).values(values))

    def end_stream(self, stream: StreamRecord) -> StreamRecord:
        """No segment may come from here on. One that has ended stays as it is."""
        with self._write(beside=()) as connection:
            live = and_(streams.c.number == stream.number, streams.c.state == StreamState.LIVE)
            ended = {"state": StreamState.ENDED, "ended_at": moment(connection)}
            connection.execute(update(streams).where(live).values(ended))
            return _find(connection, stream.id, stream.tenant) or replace(stream, state=StreamState.ENDED)

    def remove_stream(self, stream: StreamRecord) -> list[Tombstone]:
        """Delete a stream with its pieces and watches; returns what has to be removed from the store."""
        with self._write(deletes=True) as connection:
            connection.execute(delete(streams).where(streams.c.number == stream.number))
            of_it = select(watches.c.id).where(watches.c.stream == stream.id)
            connection.execute(delete(watch_answers).where(watch_answers.c.watch.in_(of_it)))
            connection.execute(delete(watches).where(watches.c.stream == stream.id))
            connection.execute(delete(pieces).where(pieces.c.stream == stream.id))
            return _end_files(connection, files.c.tenant == stream.id)

    # Pieces

    def pieces(self, stream_id: str) -> list[PieceRecord]:
        """A stream's pieces in their order on the wall clock, with their files and adapters."""
        with self._read() as connection:
            return _pieces(connection, stream_id)

    def add_segment(
        self, stream: StreamRecord, name: str, sha256: str, begins: float, seconds: float, received_at: float
    ) -> tuple[PieceRecord, bool]:
        """Place a segment that has arrived; with whether it is new. One that is sent again is the piece that it was.

        Args:
            begins: its first timestamp, seconds.

        Raises:
            StreamEnded: it has ended, or is gone.
        """
        self._check_room()
        with self._write(beside=()) as connection:
            known = _find(connection, stream.id, stream.tenant, hold=True)
            if known is None or (known.ended_at or received_at) < received_at - LATE_SECONDS:
                raise StreamEnded
            there = _pieces(connection, stream.id)
            recent = sorted(there, key=lambda piece: piece.number)[-_RECENT:]
            for piece in recent:
                if (piece.sha256, piece.name) == (sha256, name):
                    return piece, False
            offset = known.clock_offset
            for piece in there:  # sent again under another name, which its timestamps tell
                same = piece.sha256 == sha256 and begins > 0 and offset is not None
                if same and overlaps(
                    begins + (offset or 0), begins + (offset or 0) + seconds, [(piece.start, piece.end)]
                ):
                    return piece, False
            spans = [span for piece in there for span in piece.spans]
            found = place(
                begins, seconds, received_at, offset=offset, origin=known.origin, head=known.head, known=spans
            )
            origin = found.start if known.origin is None else known.origin
            if found.start < origin and all(piece.level == 0 for piece in there):  # the first ones came out of order
                origin = found.start
                for piece in there:
                    moved = slot(piece.start, piece.end, origin, known.segment_seconds)
                    connection.execute(update(pieces).where(pieces.c.number == piece.number).values(slot=moved))
            values = {
                "stream": stream.id,
                "level": 0,
                "slot": slot(found.start, found.end, origin, known.segment_seconds),
                "start": found.start,
                "end": found.end,
                "spans": [(found.start, found.end)],
                "name": name,
                "sha256": sha256,
                "file_id": f"file-{secrets.token_hex(12)}",
                "received_at": received_at,
            }
            row = connection.execute(insert(pieces).returning(pieces), values).one()
            come = {
                "clock_offset": found.offset,
                "origin": origin,
                "head": max(found.end, known.head or found.end),
                "received_at": received_at,
                "segments": known.segments + 1,
            }
            connection.execute(update(streams).where(streams.c.number == known.number).values(come))
            return _piece(row), True

    def add_piece(
        self, stream: StreamRecord, level: int, number: int, parts: Sequence[PieceRecord], sha256: str
    ) -> PieceRecord:
        """Enter a coarser piece made of `parts`; if it is there already, that is it."""
        file_id = file_of_parts(stream, parts)
        spans = joined([span for part in parts for span in part.spans])
        values = {
            "stream": stream.id,
            "level": level,
            "slot": number,
            "start": spans[0][0],
            "end": spans[-1][1],
            "spans": spans,
            "name": "",
            "sha256": sha256,
            "file_id": file_id,
            "received_at": max(part.received_at for part in parts),
        }
        with self._write(beside=()) as connection:
            connection.execute(_ENTER[connection.dialect.name], values)
            row = connection.execute(_PIECES.where(pieces.c.file_id == file_id)).one()
            return _piece(row)

    def promote_piece(self, piece: PieceRecord) -> None:
        """Let a piece that is alone in the coarser slot be what there is of it."""
        of_it = pieces.c.number == piece.number
        values = {"level": piece.level + 1, "slot": piece.slot // 2}
        with self._write(beside=()) as connection:
            connection.execute(update(pieces).where(of_it, pieces.c.level == piece.level).values(values))

    def drop_pieces(self, dropped: Collection[PieceRecord]) -> list[Tombstone]:
        """Forget pieces and their files; returns what has to be removed from the store."""
        with self._write(beside=[piece.sha256 for piece in dropped], deletes=True) as connection:
            connection.execute(delete(pieces).where(pieces.c.number.in_([piece.number for piece in dropped])))
            return _end_files(connection, files.c.id.in_([piece.file_id for piece in dropped]))

    def purge_streams(self) -> int:
        """Forget streams that ended long ago, with what was asked of them; returns how many. Their files stay."""
        with self._write(beside=()) as connection:
            over = and_(streams.c.state == StreamState.ENDED, streams.c.ended_at < moment(connection) - _KEPT_SECONDS)
            of_them = select(watches.c.id).where(watches.c.stream.in_(select(streams.c.id).where(over)))
            connection.execute(delete(watch_answers).where(watch_answers.c.watch.in_(of_them)))
            connection.execute(delete(watches).where(watches.c.id.in_(of_them)))
            return connection.execute(delete(streams).where(over)).rowcount

    def drop_orphans(self) -> list[Tombstone]:
        """Forget what was entered for a stream while it was deleted; returns what has to be removed from the store."""
        known = select(streams.c.id)
        left = and_(files.c.tenant >= STREAM_PREFIX, files.c.tenant < _BEHIND, files.c.tenant.not_in(known))
        left = and_(left, files.c.state.in_(LIVE))
        lost = pieces.c.stream.not_in(known)
        with self._read() as connection:
            if not connection.scalar(select(or_(exists().where(left), exists().where(lost)))):
                return []
        with self._write(deletes=True) as connection:
            connection.execute(delete(pieces).where(lost))
            return _end_files(connection, left)


def file_of_parts(stream: StreamRecord, parts: Sequence[PieceRecord]) -> str:
    """The id of the file that holds these pieces of a stream, whoever makes it."""
    named = " ".join([stream.id, *(part.file_id for part in parts)])
    return f"file-{hashlib.sha256(named.encode()).hexdigest()[:24]}"


def slot(start: float, end: float, origin: float, seconds: float) -> int:
    """Which slot of so many seconds, counted from `origin`, the middle of a stretch lies in."""
    return int(((start + end) / 2 - origin) // seconds)


def joined(spans: Sequence[Span], gap: float = 0.5) -> list[Span]:
    """Stretches in their order, those that touch made one; `gap`: seconds between two that still touch."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _find(connection: Connection, stream_id: str, tenant: str, *, hold: bool = False) -> StreamRecord | None:
    query: Select[Any] = select(streams).where(streams.c.id == stream_id, streams.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if hold else query).first()
    return None if row is None else stream_record(row)


def stream_record(row: Sequence[Any]) -> StreamRecord:
    """A row of `streams`, its columns in the table's order."""
    values = dict(zip(streams.c.keys(), row, strict=True))
    return StreamRecord(**{**values, "state": StreamState(values["state"])})


def _pieces(connection: Connection, stream_id: str) -> list[PieceRecord]:
    query = _PIECES.where(pieces.c.stream == stream_id).order_by(pieces.c.start, pieces.c.number)
    return [_piece(row) for row in connection.execute(query)]


def _piece(row: Sequence[Any]) -> PieceRecord:
    """A row of `pieces`, maybe followed by those of its file and adapter."""
    own = len(pieces.c)
    values = dict(zip(pieces.c.keys(), row[:own], strict=True))
    values["spans"] = tuple((start, end) for start, end in values["spans"])
    file, adapter = row[own : own + len(files.c)], row[own + len(files.c) :]
    return PieceRecord(
        **values,
        file=file_record(file) if file and file[0] is not None else None,
        adapter=adapter_record(adapter) if adapter and adapter[0] is not None else None,
    )


def _end_files(connection: Connection, chosen: Any) -> list[Tombstone]:
    query = select(files).where(chosen, files.c.state.not_in([state.value for state in GONE])).order_by(files.c.id)
    records = [file_record(row) for row in connection.execute(query.with_for_update())]
    return [one for record in records for one in end_file(connection, record, VideoState.DELETED)]
