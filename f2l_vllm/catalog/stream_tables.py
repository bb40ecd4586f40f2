"""The tables of streams: live videos, the pieces that were read of them, and the questions asked of each segment.

A piece's bytes are a file of a tenant that has the stream's id for its name: it is kept, read and removed as all files
are, and belongs to nobody who could ask about it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Float, Index, Integer, LargeBinary, String, Table, Text, UniqueConstraint

from f2l_vllm.catalog import tables
from f2l_vllm.catalog.tables import LONGEST_TENANT, AdapterRecord, FileRecord
from f2l_vllm.catalog.upload_tables import metadata

__all__ = ["PieceRecord", "StreamRecord", "StreamState", "metadata", "pieces", "streams", "watch_answers", "watches"]

STREAM_PREFIX = "stream-"
Span = tuple[float, float]


class StreamState(StrEnum):
    """`live`: segments may come. `ended`: none may."""

    LIVE = "live"
    ENDED = "ended"


streams = Table(
    "streams",
    metadata,
    Column("number", tables.Number, primary_key=True, autoincrement=True),  # the list's cursor
    Column("id", tables.Text(64), nullable=False, unique=True),
    Column("tenant", String(LONGEST_TENANT), nullable=False),
    Column("name", tables.Text(256), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("created_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("segment_seconds", Float, nullable=False),
    Column("window_seconds", Float, nullable=False),
    Column("keep_seconds", Float),
    Column("idle_seconds", Float, nullable=False),
    Column("expires_seconds", Float),
    Column("becomes_file", Boolean, nullable=False),
    Column("source", tables.Text(2048)),
    Column("details", JSON, nullable=False),
    # Where its segments' own timestamps lie on the wall clock, and how far it has come.
    Column("clock_offset", Float),
    Column("origin", Float),
    Column("head", Float),
    Column("received_at", Float),
    Column("segments", Integer, nullable=False, server_default="0"),
    Column("init", LargeBinary),  # the header that its fragments of MP4 need
    Column("file_id", tables.Text(64)),
    sqlite_autoincrement=True,
)
Index("streams_by_tenant", streams.c.tenant, streams.c.number)

pieces = Table(
    "pieces",
    metadata,
    Column("number", tables.Number, primary_key=True, autoincrement=True),
    Column("stream", String(64), nullable=False),
    Column("level", Integer, nullable=False),
    Column("slot", tables.Number, nullable=False),
    Column("start", Float, nullable=False),
    Column("end", Float, nullable=False),
    Column("spans", JSON, nullable=False),
    Column("name", tables.Text(512), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("file_id", String(64), nullable=False, unique=True),
    Column("received_at", Float, nullable=False),
    sqlite_autoincrement=True,
)
Index("pieces_by_stream", pieces.c.stream, pieces.c.number)

watches = Table(
    "watches",
    metadata,
    Column("number", tables.Number, primary_key=True, autoincrement=True),
    Column("id", tables.Text(64), nullable=False, unique=True),
    Column("stream", String(64), nullable=False, index=True),
    Column("created_at", Float, nullable=False),
    Column("question", JSON, nullable=False),  # the body of a chat completion, without its model
    Column("webhook", tables.Text(2048)),
    Column("secret", String(128)),
    Column("asked_to", Float, nullable=False),  # every segment that ended up to then has its answer
    Column("sent_to", tables.Number, nullable=False, server_default="0"),  # the last answer that the webhook has
    sqlite_autoincrement=True,
)

watch_answers = Table(
    "watch_answers",
    metadata,
    Column("number", tables.Number, primary_key=True, autoincrement=True),
    Column("watch", String(64), nullable=False),
    Column("file_id", String(64), nullable=False),  # the segment's
    Column("created_at", Float, nullable=False),
    Column("text", Text, nullable=False),
    UniqueConstraint("watch", "file_id", name="one_answer_of_each_segment"),
    sqlite_autoincrement=True,
)


@dataclass(frozen=True)
class StreamRecord:
    """One stream of one tenant. Times are Unix seconds.

    Attributes:
        segment_seconds: how long its segments are meant to be; the finest pieces' slots are so long.
        window_seconds: what a question without a stretch is about, counted back from the head.
        keep_seconds: older pieces are dropped; None: older ones are only read more coarsely.
        idle_seconds: without a segment for so long, it ends.
        expires_seconds: how long the file lasts that it becomes; None: it does not expire.
        source: the address that it is pulled from; None: its segments are pushed.
        details: JSON: the client's `metadata`, and what is to be shown of the source.
        clock_offset: what is to be added to a segment's timestamps.
        origin: when its first segment began: second 0 of the stream.
        head: when its newest segment ended.
        received_at: when the last segment arrived.
    """

    number: int
    id: str
    tenant: str
    name: str
    state: StreamState
    created_at: float
    ended_at: float | None
    segment_seconds: float
    window_seconds: float
    keep_seconds: float | None
    idle_seconds: float
    expires_seconds: float | None
    becomes_file: bool
    source: str | None
    details: dict[str, Any]
    clock_offset: float | None
    origin: float | None
    head: float | None
    received_at: float | None
    segments: int
    init: bytes | None
    file_id: str | None


@dataclass(frozen=True)
class PieceRecord:
    """A stretch of a stream that is read into one adapter: a segment, at level 0, or a coarser clip of several.

    Attributes:
        level: at level n, slots are 2**n times as long as a segment.
        slot: which of the level's slots it lies in, counted from the stream's origin.
        start, end: Unix seconds.
        spans: what of it was received, one (start, end) per stretch.
        name: what its sender called it.
        file, adapter: None while they are not there.
    """

    number: int
    stream: str
    level: int
    slot: int
    start: float
    end: float
    spans: tuple[Span, ...]
    name: str
    sha256: str
    file_id: str
    received_at: float
    file: FileRecord | None = None
    adapter: AdapterRecord | None = None


@dataclass(frozen=True)
class WatchRecord:
    """A question that is asked of each new segment of a stream."""

    number: int
    id: str
    stream: str
    created_at: float
    question: dict[str, Any]
    webhook: str | None
    secret: str | None
    asked_to: float
    sent_to: int
