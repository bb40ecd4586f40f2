"""The catalog's database: SQLite in WAL mode or PostgreSQL. No transaction decides on rows that another is changing.

SQLite takes its write lock when a write transaction begins, so there is one writer at a time. On PostgreSQL, advisory
locks do the same but let independent transactions write at the same time. A transaction either excludes all other
writers, or it names the videos (by hash) whose files, jobs and adapters it decides on and excludes only the writers
that name any of them. Transactions that write tombstones also run one after another, so that tombstones are numbered
in the order of their commits, and so do those that enter a job if there is room for one. Locks are taken in this order:
videos, tombstones, the count of a tenant's bytes, the queue of jobs. Rows of `files` are locked in the order of their
ids. Readers never wait for writers.

All moments are the database's: hosts' clocks may differ. What decides between processes asks the database (`clock`).
Other moments (`moment`, `Database.now`) are this host's, corrected by how much the two clocks differed when they were
last compared.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Float,
    cast,
    create_engine,
    event,
    extract,
    func,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from f2l_vllm.catalog import schema
from f2l_vllm.store.errors import CatalogBusy, StoreUnavailable, Unavailable
from f2l_vllm.store.room import Headroom

_WRITE_LOCK = 0x66326C  # PostgreSQL's advisory locks; any constants that are ours
_VIDEO_LOCKS, _TOMBSTONE_LOCK = 0x66326D, 0x66326E
_QUEUE_LOCK = 0x66326F
# No state belongs to a session, because a connection pooler may stand between. A connection over a link that is cut
# fails after 10 s, whatever is under way on it; by itself Linux would wait for a quarter of an hour, or for ever.
SESSION: dict[str, Any] = {
    "connect_timeout": 5,
    "prepare_threshold": None,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "tcp_user_timeout": 10_000,  # milliseconds
}
_IDLE_SECONDS = 5.0  # less than anybody waits for a lock
_JOURNAL_PAGES = 250  # SQLite's journal stays this short: on a small disk it takes room from videos
_CONNECTIONS = {"sqlite": 20, "postgresql": 5}  # kept open; twice as many at peak. PostgreSQL has few for all servers
_TOMBSTONES = f"pg_advisory_xact_lock({_TOMBSTONE_LOCK})"
# connection, idle in a transaction, rollback, resources, object in use, operator intervention
_BUSY_STATES = ("08", "25P03", "40", "53", "55", "57")


class Database:
    """One database with the catalog's tables.

    Args:
        url: a SQLAlchemy URL; `postgresql://` means the psycopg driver.
        busy_seconds: how long a transaction waits for another writer before `CatalogBusy`.

    Raises:
        ValueError: the URL's database is not supported, its driver is not installed, or a newer f2l-vllm has opened the
            catalog (`NewerCatalog`).
        Unavailable: the database cannot be opened.
    """

    def __init__(self, url: str, busy_seconds: float = 10.0) -> None:
        self._ahead = 0.0  # how far the database's clock is ahead of this host's, in seconds
        self._engine = _engine(url, busy_seconds).execution_options(now=self.now)
        self._headroom = _headroom(self._engine)
        with self._read() as connection:
            self._clock(connection)
            is_current = schema.version_of(connection) == schema.KNOWN[-1]
        if not is_current:
            with self._write() as connection:
                schema.bring_up_to_date(connection)

    @property
    def url(self) -> URL:
        """Where it is."""
        return self._engine.url

    def notify(self, channel: str, payload: str) -> None:
        """Tell whoever listens to a channel of PostgreSQL's."""
        with self._append() as connection:
            connection.execute(select(func.pg_notify(channel, payload)))

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def now(self) -> float:
        """The time in Unix seconds by the database's clock, without asking it."""
        return time.time() + self._ahead

    def _clock(self, connection: Connection) -> float:
        """As `clock`; this host's clock is compared with it."""
        before = time.time()
        found = clock(connection)
        self._ahead = found - (before + time.time()) / 2
        return found

    def _check_room(self) -> None:
        """Check for room before a change that makes the catalog larger.

        Raises:
            StoreUnavailable: only the room kept for deletions is left.
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
            beside: others may write at the same time unless they also name one of these videos; None: no others write.
            deletes: it writes tombstones. Without this, call `write_tombstones` before writing the first one.
        """
        if self._headroom is not None:
            self._headroom.adjust()
        with _translated(), self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                self._lock(connection, beside, deletes)
            yield connection

    @contextmanager
    def _append(self) -> Iterator[Connection]:
        """A transaction that adds rows on which no other transaction decides."""
        if self._engine.dialect.name != "postgresql":
            with self._write() as connection:
                yield connection
            return
        with _translated(), self._engine.begin() as connection:
            yield connection

    def _lock(self, connection: Connection, beside: Collection[str] | None, deletes: bool) -> None:
        """Take all locks in one statement, whose parts run in order."""
        parts = [f"pg_advisory_xact_lock{'' if beside is None else '_shared'}({_WRITE_LOCK})"]
        values: dict[str, Any] = {}
        for number, key in enumerate(sorted({_key(video) for video in beside or ()})):
            parts.append(f"pg_advisory_xact_lock({_VIDEO_LOCKS}, :key{number})")
            values[f"key{number}"] = key
        if deletes:
            parts.append(_TOMBSTONES)
        connection.execute(text(f"SELECT {', '.join(parts)}"), values)


class Queue(Enum):
    """How a transaction that enters a job holds the queue of jobs.

    Only one at a time can hold it with `LITTLE_ROOM`. Any number hold it with `MUCH_ROOM`, which is why they leave
    `SPARE` places: when the last of them sees that room, less than `SPARE` others have yet to enter theirs.
    """

    LITTLE_ROOM = func.pg_advisory_xact_lock(_QUEUE_LOCK)
    MUCH_ROOM = func.pg_advisory_xact_lock_shared(_QUEUE_LOCK)


SPARE = 1000  # more than a PostgreSQL server has connections


def write_tombstones(connection: Connection) -> None:
    """Take the tombstone lock; call this before the first tombstone if the transaction began without `deletes`."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT {_TOMBSTONES}"))


def _key(video: str) -> int:
    return int.from_bytes(hashlib.sha256(video.encode()).digest()[:4], signed=True)


def clock(connection: Connection) -> float:
    """The time in Unix seconds, by the clock that all processes sharing the database use."""
    return float(connection.scalar(select(now(connection))) or 0.0)


def moment(connection: Connection) -> float:
    """`Database.now`, for a step within a transaction."""
    corrected: Callable[[], float] = connection.get_execution_options()["now"]
    return corrected()


def now(connection: Connection) -> ColumnElement[float]:
    """`clock` as an expression in a statement."""
    if connection.dialect.name != "postgresql":
        return literal(time.time())
    return cast(extract("epoch", func.clock_timestamp()), Float)


def check_url(url: str) -> None:
    """Check that a catalog can be kept at this URL, without connecting.

    Raises:
        ValueError: as in `Database`.
    """
    _engine(url, 1.0).dispose()


def check_reachable(url: str) -> None:
    """Check that the database answers, and that its tables are known; a missing SQLite file is created.

    Raises:
        ValueError: it does not answer, it refuses, or its tables are those of a newer f2l-vllm; the message holds the
            reason and no password.
    """
    engine = _engine(url, 1.0)
    try:
        with engine.connect().execution_options(read=True) as connection:
            schema.version_of(connection)
    except DBAPIError as error:
        if (found := _unavailable(error)) is not None and found.full:
            return  # users need a running server to delete files and make room
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
            engine = create_engine(parsed, connect_args=SESSION, pool_pre_ping=True, **options)
            _bound_waits(engine, busy_seconds)
            return engine
        engine = create_engine(parsed, connect_args={"timeout": busy_seconds, "check_same_thread": False}, **options)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        message = f"no driver for {parsed.drivername}: install it, for PostgreSQL with pip install 'psycopg[binary]'"
        raise ValueError(message) from error

    # SQLite opens a file that it may not write for reading alone, and such a connection never writes again.
    def is_read_only() -> bool:
        return not os.access(parsed.database or "", os.W_OK)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # transactions begin only in `_begin`
        _enter_wal(connection, busy_seconds)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint={_JOURNAL_PAGES}")
        record.info["read_only"] = is_read_only()

    @event.listens_for(engine, "checkout")
    def _check(_connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if record.info["read_only"] and not is_read_only():
            raise DisconnectionError  # the pool opens another one

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read = connection.get_execution_options().get("read", False)
        connection.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")

    @event.listens_for(engine, "handle_error")
    def _open_again(context: ExceptionContext) -> None:
        if getattr(context.original_exception, "sqlite_errorname", "").startswith("SQLITE_READONLY"):
            context.is_disconnect = True

    return engine


def _enter_wal(connection: sqlite3.Connection, busy_seconds: float) -> None:
    """Have SQLite write ahead. It refuses this at once, without its own wait, where another connection does the same
    to a new database or closes the last one of an old one."""
    give_up = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def _bound_waits(engine: Engine, busy_seconds: float) -> None:
    """Have each transaction, readers' too, wait at most so long for a lock, and PostgreSQL `_IDLE_SECONDS` for the
    transaction: the locks of a process that was stopped or cut off in the middle go to those that wait for them."""
    waits = {"lock_timeout": busy_seconds, "idle_in_transaction_session_timeout": _IDLE_SECONDS}
    settings = (f"set_config('{name}', '{seconds * 1000:.0f}', true)" for name, seconds in waits.items())
    bound = f"SELECT {', '.join(settings)}"

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        driver = connection.connection.driver_connection
        assert driver is not None
        try:
            with driver.pipeline():  # with BEGIN in one round trip
                driver.execute(bound)
        except engine.dialect.loaded_dbapi.OperationalError as error:  # SQLAlchemy wraps those of its own calls only
            connection.invalidate()
            raise OperationalError(bound, None, error) from error


def _headroom(engine: Engine) -> Headroom | None:
    """Headroom for a database in a plain file; PostgreSQL manages its own disk."""
    path = engine.url.database or ""
    if engine.dialect.name != "sqlite" or not path or path.startswith(("file:", ":")) or not Path(path).parent.is_dir():
        return None
    return Headroom(Path(path))


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
    """Translate the database's errors for busy, full, read-only and away; None for an error that must be a bug."""
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
        return busy if isinstance(error, OperationalError) else None
    return busy if state.startswith(_BUSY_STATES) else None
