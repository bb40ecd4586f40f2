"""The servers of a catalog, and how far each of them has forgotten what was deleted.

Deletions are numbered by the `seq` of their tombstones, ascending in the order of their commits. A server forgets them
in that order and enters how far it has come. Nobody waits for a server that gives no sign of life for `SERVER_SECONDS`.
It has to join again under another id, and has to compare what it keeps with the catalog before that. An id is the
server's lasting name and what makes it unique.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection

from sqlalchemy import delete, exists, func, insert, or_, select, update

from f2l_vllm.catalog.database import Database, clock
from f2l_vllm.catalog.tables import Tombstone, servers, tombstones
from f2l_vllm.catalog.tombstones import tombstone_record

SERVER_SECONDS = 60.0  # many times the interval between two signs of life


class Servers(Database):
    """What servers tell each other about deletions."""

    def join_server(self, name: str, revision: str, place: str = "") -> tuple[str, int]:
        """Enter a server that has forgotten nothing yet, instead of an earlier one of the same name.

        Args:
            place: where it runs, for people.

        Returns:
            Its id, and the newest deletion, up to which it has to compare.
        """
        server = f"{name}-{secrets.token_hex(8)}"
        with self._write(deletes=True) as connection:  # so no deletion is half written
            now = clock(connection)
            over = or_(servers.c.id.startswith(f"{name}-", autoescape=True), servers.c.seen_at < now - SERVER_SECONDS)
            connection.execute(delete(servers).where(over))
            values = {"id": server, "seen_at": now, "applied": -1, "heard": -1, "revision": revision, "place": place}
            connection.execute(insert(servers).values(values))
            return server, connection.scalar(select(func.max(tombstones.c.seq))) or 0

    def beat_server(self, server: str, applied: int, heard: int | None = None) -> bool:
        """Note that a server runs and has forgotten every deletion up to `applied`, and up to `heard` all but adapters
        that answers still use. False: it has to join again."""
        with self._write(beside=()) as connection:
            now = self._clock(connection)
            known = update(servers).where(servers.c.id == server, servers.c.seen_at >= now - SERVER_SECONDS)
            is_known = connection.execute(known.values(seen_at=now, applied=applied, heard=heard)).rowcount == 1
            gone = servers.c.seen_at < now - SERVER_SECONDS
            any_gone = connection.scalar(select(exists().where(gone)))
        if any_gone:
            with self._write() as connection:
                connection.execute(delete(servers).where(gone))
        return is_known

    def servers(self, revision: str) -> list[str]:
        """The lasting names of the servers of a revision that run."""
        with self._read() as connection:
            running = servers.c.seen_at >= clock(connection) - SERVER_SECONDS
            ids = connection.scalars(select(servers.c.id).where(running, servers.c.revision == revision))
            return sorted(server.rpartition("-")[0] for server in ids)

    def leave_server(self, server: str) -> None:
        """Remove a server that stops and keeps nothing in memory."""
        with self._write(beside=()) as connection:
            connection.execute(delete(servers).where(servers.c.id == server))

    def deletions_after(self, seq: int, limit: int) -> list[Tombstone]:
        """At most `limit` deletions after this one, in order."""
        later = select(tombstones).where(tombstones.c.seq > seq, tombstones.c.reserved.is_(False))
        with self._read() as connection:
            return [tombstone_record(row) for row in connection.execute(later.order_by(tombstones.c.seq).limit(limit))]

    def is_erased(self, deletions: Collection[int]) -> bool:
        """Whether nothing is left of what was deleted, neither in the store nor on any running server."""
        if not deletions:
            return True
        left = exists().where(tombstones.c.seq.in_(deletions), tombstones.c.done_at.is_(None))
        with self._read() as connection:
            since = clock(connection) - SERVER_SECONDS
            behind = exists().where(servers.c.seen_at >= since, servers.c.applied < max(deletions))
            return not connection.scalar(select(left)) and not connection.scalar(select(behind))

    def unaware(self, seq: int) -> list[str]:
        """Where the running servers are that have not heard of this tombstone."""
        with self._read() as connection:
            running = servers.c.seen_at >= clock(connection) - SERVER_SECONDS
            behind = select(servers.c.place).where(running, servers.c.heard < seq)
            return list(connection.scalars(behind.order_by(servers.c.place)))
