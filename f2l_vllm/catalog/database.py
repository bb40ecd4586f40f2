"""The catalog's database: SQLite in WAL mode or PostgreSQL. No transaction decides on rows that another is changing.

SQLite takes its write lock when a write transaction begins: there is one writer at a time. On PostgreSQL advisory locks
do the same, and let those write beside each other that have nothing to do with each other: a transaction is either
alone, or it names the videos (by hash) whose files, jobs and adapters it decides on, and is alone with each of them.
Those that write tombstones follow each other besides, so that tombstones are numbered in the order of their commits.
Locks are taken in that order, and a tenant's count of bytes last. Readers never wait for writers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Float,
    cast,
    create_engine,
    event,
    extract,
    func,
    inspect,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.schema import CreateColumn

from f2l_vllm.catalog.tables import metadata
from f2l_vllm.store.errors import CatalogBusy, StoreUnavailable, Unavailable
from f2l_vllm.store.room import Headroom

_WRITE_LOCK = 0x66326C  # PostgreSQL's advisory locks; any constants that are ours
_VIDEO_LOCKS, _TOMBSTONE_LOCK = 0x66326D, 0x66326E
_CONNECT_SECONDS = 5
_JOURNAL_PAGES = 250  # SQLite's journal stays this short: on a small disk it is in the way of videos
_CONNECTIONS = {"sqlite": 20, "postgresql": 5}  # kept, and as many again; PostgreSQL has few for all servers
_TOMBSTONES = f"pg_advisory_xact_lock({_TOMBSTONE_LOCK})"
_BUSY_STATES = ("08", "40", "53", "55", "57")  # connection, rollback, resources, object in use, operator intervention


class Database:
    """One database with the catalog's tables.

    Args:
        url: SQLAlchemy URL; `postgresql://` means the psycopg driver.
        busy_seconds: how long a transaction waits for another writer before `CatalogBusy`.

    Raises:
        ValueError: a URL of a database that is not supported, or whose driver is not installed.
        Unavailable: the database cannot be opened.
    """

    def __init__(self, url: str, busy_seconds: float = 10.0) -> None:
        self._engine = _engine(url, busy_seconds)
        self._lock_timeout = f"{int(busy_seconds * 1000)}"  # milliseconds
        self._headroom = _headroom(self._engine)
        with self._write() as connection:
            _create_tables(connection)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _check_room(self) -> None:
        """Before a change that makes the catalog larger.

        Raises:
            StoreUnavailable: only the room for deletions is left.
        """
        if self._headroom is not None:
            self._headroom.check()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with _translated(), self._engine.connect().execution_options(read=True) as connection:
            yield connection

    @contextmanager
    def _write(self, beside: Collection[str] | None = None, *, deletes: bool = False) -> Iterator[Connection]:
        """A transaction that writes.

        Args:
            beside: others may write at the same time, but for those that name any of these videos, too; None: nobody.
            deletes: it writes tombstones. Without it `write_tombstones` comes before the first.
        """
        if self._headroom is not None:
            self._headroom.adjust()
        with _translated(), self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                self._lock(connection, beside, deletes)
            yield connection

    @contextmanager
    def _append(self) -> Iterator[Connection]:
        """A transaction that adds rows which no other decides on."""
        if self._engine.dialect.name != "postgresql":
            with self._write() as connection:
                yield connection
            return
        with _translated(), self._engine.begin() as connection:
            yield connection

    def _lock(self, connection: Connection, beside: Collection[str] | None, deletes: bool) -> None:
        """All locks by one statement, whose parts are done in their order."""
        parts = ["set_config('lock_timeout', :timeout, true)"]
        values: dict[str, Any] = {"timeout": self._lock_timeout}
        parts.append(f"pg_advisory_xact_lock{'' if beside is None else '_shared'}({_WRITE_LOCK})")
        for number, key in enumerate(sorted({_key(video) for video in beside or ()})):
            parts.append(f"pg_advisory_xact_lock({_VIDEO_LOCKS}, :key{number})")
            values[f"key{number}"] = key
        if deletes:
            parts.append(_TOMBSTONES)
        connection.execute(text(f"SELECT {', '.join(parts)}"), values)


def write_tombstones(connection: Connection) -> None:
    """Before the first tombstone of a transaction that seldom writes one."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT {_TOMBSTONES}"))


def _key(video: str) -> int:
    return int.from_bytes(hashlib.sha256(video.encode()).digest()[:4], signed=True)


def clock(connection: Connection) -> float:
    """The time by the clock that all who share the database go by, Unix seconds."""
    return float(connection.scalar(select(now(connection))) or 0.0)


def now(connection: Connection) -> ColumnElement[float]:
    """`clock` as a part of a statement."""
    if connection.dialect.name != "postgresql":
        return literal(time.time())
    return cast(extract("epoch", func.clock_timestamp()), Float)


def check_url(url: str) -> None:
    """Whether a catalog could live there, without looking.

    Raises:
        ValueError: as `Database`.
    """
    _engine(url, 1.0).dispose()


def check_reachable(url: str) -> None:
    """Whether the database answers; SQLite's file is made where it is not.

    Raises:
        ValueError: it does not, or it refuses; the message holds its reason and no password.
    """
    engine = _engine(url, 1.0)
    try:
        engine.connect().close()
    except DBAPIError as error:
        if (found := _unavailable(error)) is not None and found.full:
            return  # a server on a full disk is how its users make room
        reason = " ".join(str(error.orig).split())
        raise ValueError(f"F2L_DATABASE_URL: the catalog's database cannot be used: {reason}") from error
    finally:
        engine.dispose()


def _engine(url: str, busy_seconds: float) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ValueError(f"F2L_DATABASE_URL is no database URL: {error}") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise ValueError(
            f"the catalog lives in SQLite or PostgreSQL, not {kind!r}: set F2L_DATABASE_URL to one of them"
        )
    connections = _CONNECTIONS[kind]
    options: dict[str, Any] = {"pool_size": connections, "max_overflow": connections, "pool_timeout": busy_seconds}
    try:
        if kind == "postgresql":
            # Nothing belongs to a session: a pool of connections may stand between.
            session = {"connect_timeout": _CONNECT_SECONDS, "prepare_threshold": None}
            return create_engine(parsed, connect_args=session, pool_pre_ping=True, **options)
        engine = create_engine(parsed, connect_args={"timeout": busy_seconds, "check_same_thread": False}, **options)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        message = f"no driver for {parsed.drivername}: install it, for PostgreSQL with pip install 'psycopg[binary]'"
        raise ValueError(message) from error

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin in `_begin`, nowhere else
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint={_JOURNAL_PAGES}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read = connection.get_execution_options().get("read", False)
        connection.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")

    return engine


def _headroom(engine: Engine) -> Headroom | None:
    """For a database in a plain file; PostgreSQL's disk is its own."""
    path = engine.url.database or ""
    if engine.dialect.name != "sqlite" or not path or path.startswith(("file:", ":")) or not Path(path).parent.is_dir():
        return None
    return Headroom(Path(path))


def _create_tables(connection: Connection) -> None:
    """Create what is missing, columns and indexes included: a catalog of an earlier version is opened as it is."""
    metadata.create_all(connection)
    inspector = inspect(connection)
    for table in metadata.sorted_tables:
        known = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                definition = CreateColumn(column).compile(dialect=connection.dialect)
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))
        for index in table.indexes:
            index.create(connection, checkfirst=True)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise CatalogBusy("the catalog's connections are all in use") from error
    except DBAPIError as error:
        if (unavailable := _unavailable(error)) is not None:
            raise unavailable from error
        raise


def _unavailable(error: DBAPIError) -> Unavailable | None:
    """The database's own words for busy, full, read-only or away; None for what can only be a bug."""
    reason = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    busy = CatalogBusy(f"the catalog is busy: {reason}")
    full = StoreUnavailable(f"no room is left for the catalog: {reason}", full=True)
    closed = StoreUnavailable(f"the catalog cannot be read or written: {reason}")
    lite = getattr(error.orig, "sqlite_errorname", None)
    if lite is not None:
        if lite == "SQLITE_FULL":
            return full
        if lite.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
            return busy
        return closed if lite.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_IOERR")) else None
    state = getattr(error.orig, "sqlstate", None)
    if state == "53100":
        return full
    if state == "25006":
        return closed
    if state is None:  # the server could not be reached, or hung up
        return busy if type(error.orig).__name__ == "OperationalError" else None
    return busy if state.startswith(_BUSY_STATES) else None
