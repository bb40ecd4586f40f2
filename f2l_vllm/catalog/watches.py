"""Standing questions: what is asked of each segment of a stream, and what was answered."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from f2l_vllm.catalog.database import Database, moment
from f2l_vllm.catalog.stream_tables import (
    PieceRecord,
    StreamRecord,
    WatchRecord,
    streams,
    watch_answers,
    watches,
)
from f2l_vllm.catalog.streams import TooManyStreams, stream_record

_ANSWERS = 1000  # of a watch that are kept
_ENTER = {
    name: kind.insert(watch_answers).on_conflict_do_nothing().returning(watch_answers.c.number)
    for name, kind in (("sqlite", sqlite), ("postgresql", postgresql))
}


class Watches(Database):
    """The watches of all streams. Every method is one transaction."""

    def add_watch(
        self, stream: StreamRecord, question: dict[str, Any], webhook: str | None, secret: str | None, *, limit: int
    ) -> WatchRecord:
        """Ask this of each segment that ends from here on.

        Raises:
            TooManyStreams: the stream has `limit` watches.
        """
        self._check_room()
        there = select(func.count()).where(watches.c.stream == stream.id)
        with self._write() as connection:
            if (connection.scalar(there) or 0) >= limit:
                raise TooManyStreams
            now = moment(connection)
            values = {
                "id": f"watch_{secrets.token_hex(12)}",
                "stream": stream.id,
                "created_at": now,
                "question": question,
                "webhook": webhook,
                "secret": secret,
                "asked_to": stream.head or 0.0,
            }
            return WatchRecord(**connection.execute(insert(watches).returning(watches), values).one()._mapping)

    def watches(self, stream_id: str) -> list[WatchRecord]:
        """A stream's watches, oldest first."""
        query = select(watches).where(watches.c.stream == stream_id).order_by(watches.c.number)
        with self._read() as connection:
            return [WatchRecord(**row._mapping) for row in connection.execute(query)]

    def open_watches(self) -> list[tuple[StreamRecord, WatchRecord]]:
        """All watches, each with its stream."""
        query = select(streams, watches).join(watches, watches.c.stream == streams.c.id).order_by(watches.c.number)
        own = len(streams.c)
        with self._read() as connection:
            found = []
            for row in connection.execute(query):
                watch = dict(zip(watches.c.keys(), row[own:], strict=True))
                found.append((stream_record(row[:own]), WatchRecord(**watch)))
            return found

    def remove_watch(self, watch: WatchRecord) -> None:
        """Ask it no more."""
        with self._write(beside=()) as connection:
            connection.execute(delete(watch_answers).where(watch_answers.c.watch == watch.id))
            connection.execute(delete(watches).where(watches.c.number == watch.number))

    def add_watch_answer(self, watch: WatchRecord, piece: PieceRecord, text: str) -> None:
        """Keep the answer about a segment, unless there is one."""
        with self._write(beside=()) as connection:
            known = connection.execute(
                select(watches).where(watches.c.number == watch.number).with_for_update()
            ).first()
            if known is None:
                return
            values = {"watch": watch.id, "file_id": piece.file_id, "created_at": moment(connection), "text": text}
            number = connection.scalar(_ENTER[connection.dialect.name], values)
            newer = update(watches).where(watches.c.number == watch.number, watches.c.asked_to < piece.end)
            connection.execute(newer.values(asked_to=piece.end))
            if number is not None:
                of_watch = watch_answers.c.watch == watch.id
                newest = select(watch_answers.c.number).where(of_watch).order_by(watch_answers.c.number.desc())
                connection.execute(
                    delete(watch_answers).where(
                        of_watch, watch_answers.c.number <= newest.limit(1).offset(_ANSWERS).scalar_subquery()
                    )
                )

    def watch_answers(self, watch_id: str, after: int, limit: int) -> list[tuple[int, str]]:
        """At most `limit` answers behind this number, each with its number, in their order."""
        query = select(watch_answers.c.number, watch_answers.c.text)
        query = query.where(watch_answers.c.watch == watch_id, watch_answers.c.number > after)
        with self._read() as connection:
            found = connection.execute(query.order_by(watch_answers.c.number).limit(limit))
            return [(row.number, row.text) for row in found]

    def note_sent(self, watch: WatchRecord, number: int) -> None:
        """Note that a webhook has every answer up to this one."""
        with self._write(beside=()) as connection:
            connection.execute(update(watches).where(watches.c.number == watch.number).values(sent_to=number))
