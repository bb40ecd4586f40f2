"""The tables of batches, many questions in one file, and the life of a batch as a state machine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Float, Index, Integer, String, Table, Text

from f2l_vllm.catalog import tables
from f2l_vllm.catalog.tables import LONGEST_TENANT, metadata

__all__ = ["BatchRecord", "BatchState", "answers", "batches", "metadata"]


class BatchState(StrEnum):
    """The state of a batch, with OpenAI's names. Answers come in while it is `in_progress`, and then no more."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


_S = BatchState
TRANSITIONS: dict[BatchState, frozenset[BatchState]] = {
    _S.VALIDATING: frozenset({_S.IN_PROGRESS, _S.FAILED, _S.EXPIRED, _S.CANCELLING}),
    _S.IN_PROGRESS: frozenset({_S.FINALIZING, _S.CANCELLING}),
    _S.FINALIZING: frozenset({_S.COMPLETED, _S.FAILED, _S.EXPIRED}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
}
"""A state that is no key here is an end."""

batches = Table(
    "batches",
    metadata,
    Column("number", tables.Number, primary_key=True, autoincrement=True),  # the list's cursor
    Column("id", tables.Text(64), nullable=False, unique=True),
    Column("tenant", String(LONGEST_TENANT), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("endpoint", String(64), nullable=False),
    Column("input_file", tables.Text(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("ended_at", Float, index=True),
    Column("total", Integer, nullable=False, server_default="0"),  # its requests
    Column("completed", Integer, nullable=False, server_default="0"),
    Column("failed", Integer, nullable=False, server_default="0"),
    Column("details", JSON, nullable=False),  # what only its owner asks about: times, metadata, errors, files
    sqlite_autoincrement=True,
)
Index("batches_by_tenant", batches.c.tenant, batches.c.number)

# What a batch that has not ended has answered: one line of its files for each line of its input, at most.
answers = Table(
    "answers",
    metadata,
    Column("batch", tables.Number, primary_key=True, autoincrement=False),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("is_success", Boolean, nullable=False),
    Column("text", Text, nullable=False),
)


@dataclass(frozen=True)
class BatchRecord:
    """One batch of one tenant. Times are Unix seconds; `details` are JSON."""

    number: int
    id: str
    tenant: str
    state: BatchState
    endpoint: str
    input_file: str
    created_at: float
    expires_at: float
    ended_at: float | None
    total: int
    completed: int
    failed: int
    details: dict[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it changes any more."""
        return self.state not in TRANSITIONS
