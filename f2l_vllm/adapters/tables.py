"""The catalog's tables, its records, and the engine they live in (SQLite in WAL mode)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    make_url,
)

from f2l_vllm.adapters.states import VideoState

metadata = MetaData()

files = Table(
    "files",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),  # upload order: the list's cursor
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", String(128), nullable=False),
    Column("filename", String(1024), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("adapter_name", String(128), nullable=False, index=True),
    Column("state", String(16), nullable=False, index=True),
    Column("progress", Float, nullable=False, default=0.0),
    Column("error_code", String(64)),
    Column("error_message", String(2048)),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, index=True),
    sqlite_autoincrement=True,
)
Index("files_by_tenant", files.c.tenant, files.c.number)

# An adapter's id is its LoRA int id in every engine: allocated here only, ascending, never used again.
adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("rank", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("info", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("adapter_name", String(128), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False),
    Column("running", Integer, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("created_at", Float, nullable=False),
    sqlite_autoincrement=True,
)


@dataclass(frozen=True)
class FileRecord:
    """One file id of one tenant. Times are Unix seconds; `progress` is 0..1 within the state."""

    number: int
    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    adapter_name: str
    state: VideoState
    progress: float
    error_code: str | None
    error_message: str | None
    created_at: float
    expires_at: float | None


@dataclass(frozen=True)
class AdapterRecord:
    """One published adapter; `id` is its LoRA int id; `info` holds frames, duration, tokens and timings."""

    id: int
    name: str
    rank: int
    bytes: int
    info: dict[str, Any]
    created_at: float


@dataclass(frozen=True)
class Job:
    """One adapter to be made, whoever waits for it. `attempts` counts this one."""

    adapter_name: str
    sha256: str
    attempts: int


def open_engine(url: str) -> Engine:
    """An engine with the tables in it.

    SQLite runs in WAL mode and takes its write lock when a write transaction begins: two writers wait for each other
    instead of failing half-way. Reads begin with the execution option `read=True` and never wait.
    """
    sqlite = make_url(url).get_backend_name() == "sqlite"
    engine = create_engine(url, connect_args={"timeout": 30.0, "check_same_thread": False} if sqlite else {})
    if sqlite:

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # transactions begin in `_begin`, nowhere else
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            read = connection.get_execution_options().get("read", False)
            connection.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")

    metadata.create_all(engine)
    return engine
