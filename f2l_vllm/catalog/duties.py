"""Work that one of all servers does for the others."""

from __future__ import annotations

from sqlalchemy import delete, insert, or_, select, update

from f2l_vllm.catalog.database import Database, clock
from f2l_vllm.catalog.tables import duties

HELD_SECONDS = 15.0  # a duty whose holder has not renewed it for so long is another's; several times the interval


class Duties(Database):
    """A duty is held by one server at a time. Whatever it does has to be right if two do it at once, too: a server that
    was stopped in the middle goes on when another has the duty."""

    def hold_duty(self, name: str, server: str) -> bool:
        """Take a duty, or renew it; False if another server holds it."""
        of_name = duties.c.name == name
        with self._read() as connection:
            since = clock(connection) - HELD_SECONDS
            known = connection.execute(select(duties.c.holder, duties.c.taken_at).where(of_name)).first()
        if known is not None and known.holder not in (server, None) and known.taken_at > since:
            return False
        with self._write(beside=() if known is not None else None) as connection:
            now = clock(connection)
            if known is None and connection.scalar(select(duties.c.name).where(of_name)) is None:
                connection.execute(insert(duties).values(name=name, holder=server, taken_at=now))
                return True
            mine = or_(duties.c.holder == server, duties.c.holder.is_(None), duties.c.taken_at <= now - HELD_SECONDS)
            taken = update(duties).where(of_name, mine).values(holder=server, taken_at=now)
            return connection.execute(taken).rowcount == 1

    def leave_duties(self, server: str) -> None:
        """Let others take what this server holds."""
        with self._write(beside=()) as connection:
            connection.execute(delete(duties).where(duties.c.holder == server))

    def is_due(self, name: str, every: float) -> bool:
        """Whether recurring work has to be done now, by whoever asks: nobody has for `every` seconds."""
        of_name = duties.c.name == name
        with self._write() as connection:
            now = clock(connection)
            taken_at = connection.scalar(select(duties.c.taken_at).where(of_name))
            if taken_at is None:
                connection.execute(insert(duties).values(name=name, taken_at=now))
                return True
            due = update(duties).where(of_name, duties.c.taken_at <= now - every)
            return connection.execute(due.values(taken_at=now)).rowcount == 1
