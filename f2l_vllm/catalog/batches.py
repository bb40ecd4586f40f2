"""Batches: many questions in one file, answered by one of the servers of a catalog behind everybody's own.

Each answer is a row from the moment it is given until its batch ends, so a server that is killed loses those it was
waiting for and no others. A line has one row, whoever answers it and however often, and rows come only while the batch
is in progress. So two servers that both take a batch for their own do no harm: their files are the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from f2l_vllm.catalog.batch_tables import TRANSITIONS, BatchRecord, BatchState, answers, batches
from f2l_vllm.catalog.database import Database, moment
from f2l_vllm.catalog.tables import duties

OPEN = [state.value for state in TRANSITIONS]
_KEPT_SECONDS = 30 * 86400.0  # how long a batch that has ended is listed
_ENTER = {
    name: kind.insert(answers).on_conflict_do_nothing().returning(answers.c.line)
    for name, kind in (("sqlite", sqlite), ("postgresql", postgresql))
}


class TooManyBatches(RuntimeError):
    """The tenant has as many open batches as it may have."""


class Batches(Database):
    """The batches of all tenants. Every method is one transaction."""

    def add_batch(
        self, tenant: str, endpoint: str, input_file: str, *, seconds: float, limit: int, details: dict[str, Any]
    ) -> BatchRecord:
        """Enter a batch that has so many seconds.

        Raises:
            TooManyBatches: the tenant has `limit` open ones.
        """
        self._check_room()
        is_open = select(func.count()).where(batches.c.tenant == tenant, batches.c.state.in_(OPEN))
        with self._write() as connection:
            if (connection.scalar(is_open) or 0) >= limit:
                raise TooManyBatches
            now = moment(connection)
            values = {
                "id": f"batch_{secrets.token_hex(12)}",
                "tenant": tenant,
                "state": BatchState.VALIDATING,
                "endpoint": endpoint,
                "input_file": input_file,
                "created_at": now,
                "expires_at": now + seconds,
                "details": details,
            }
            return _record(connection.execute(insert(batches).returning(batches), values).one())

    def batch(self, batch_id: str, tenant: str) -> BatchRecord | None:
        """A tenant's batch; None if there is no such batch."""
        with self._read() as connection:
            return _find(connection, batch_id, tenant)

    def batches(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """One page of a tenant's batches, newest first, and whether more follow.

        Raises:
            KeyError: `after` names no batch of this tenant.
        """
        query = select(batches).where(batches.c.tenant == tenant).order_by(batches.c.number.desc()).limit(limit + 1)
        with self._read() as connection:
            if after is not None:
                if (cursor := _find(connection, after, tenant)) is None:
                    raise KeyError(after)
                query = query.where(batches.c.number < cursor.number)
            rows = connection.execute(query).all()
        return [_record(row) for row in rows[:limit]], len(rows) > limit

    def open_batches(self) -> list[BatchRecord]:
        """All tenants' batches that have not ended, oldest first."""
        with self._read() as connection:
            rows = connection.execute(select(batches).where(batches.c.state.in_(OPEN)).order_by(batches.c.number))
            return [_record(row) for row in rows]

    def move_batch(self, batch: BatchRecord, state: BatchState, *, total: int = 0, **details: Any) -> BatchRecord:
        """Move a batch to another state if the state machine has that transition, else leave it; returns what it is.
        Its answers go with its end.

        Args:
            total: how many requests it has, if that is known only now.
            details: what is added to its details.
        """
        with self._write(beside=()) as connection:
            known = _find(connection, batch.id, batch.tenant, hold=True)
            if known is None or state not in TRANSITIONS.get(known.state, ()):
                return known or batch
            now = moment(connection)
            values: dict[str, Any] = {"state": state, "total": total or known.total}
            values["details"] = {**known.details, f"{state}_at": int(now), **details}
            if state not in TRANSITIONS:
                values["ended_at"] = now
                connection.execute(delete(answers).where(answers.c.batch == known.number))
                connection.execute(delete(duties).where(duties.c.name == duty(known)))
            changed = update(batches).where(batches.c.number == known.number).values(values)
            return _record(connection.execute(changed.returning(batches)).one())

    def add_answer(self, batch: BatchRecord, line: int, text: str, *, is_success: bool) -> bool:
        """Keep the answer to a line of a batch in progress; False if it is too late, or the line has one."""
        self._check_room()
        with self._write(beside=()) as connection:
            known = _find(connection, batch.id, batch.tenant, hold=True)
            if known is None or known.state is not BatchState.IN_PROGRESS:
                return False
            values = {"batch": batch.number, "line": line, "is_success": is_success, "text": text}
            if connection.scalar(_ENTER[connection.dialect.name], values) is None:
                return False
            count = batches.c.completed if is_success else batches.c.failed
            connection.execute(update(batches).where(batches.c.number == batch.number).values({count: count + 1}))
            return True

    def answered(self, batch: BatchRecord) -> set[int]:
        """The lines of a batch that have an answer."""
        with self._read() as connection:
            return set(connection.scalars(select(answers.c.line).where(answers.c.batch == batch.number)))

    def answers(self, batch: BatchRecord, *, is_success: bool, after: int, limit: int) -> list[tuple[int, str]]:
        """At most `limit` answers behind this line, each with its line, in their order."""
        query = select(answers.c.line, answers.c.text).where(answers.c.batch == batch.number, answers.c.line > after)
        query = query.where(answers.c.is_success == is_success).order_by(answers.c.line).limit(limit)
        with self._read() as connection:
            return [(row.line, row.text) for row in connection.execute(query)]

    def purge_batches(self) -> int:
        """Forget batches that ended long ago; returns how many."""
        with self._write(beside=()) as connection:
            over = batches.c.ended_at < moment(connection) - _KEPT_SECONDS
            return connection.execute(delete(batches).where(over)).rowcount


def duty(batch: BatchRecord) -> str:
    """The name of the duty of whoever works on a batch."""
    return f"batch {batch.id}"


def _find(connection: Connection, batch_id: str, tenant: str, *, hold: bool = False) -> BatchRecord | None:
    query = select(batches).where(batches.c.id == batch_id, batches.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if hold else query).first()
    return None if row is None else _record(row)


def _record(row: Sequence[Any]) -> BatchRecord:
    values = dict(zip(batches.c.keys(), row, strict=True))
    return BatchRecord(**{**values, "state": BatchState(values["state"])})
