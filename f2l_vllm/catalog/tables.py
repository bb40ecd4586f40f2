"""The catalog's tables and its records. Whatever changes here needs a step in `migrations/versions/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    and_,
    false,
    literal_column,
)
from sqlalchemy.engine import Dialect

from f2l_vllm.catalog.states import LIVE, VideoState
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.address import object_name


class Text(TypeDecorator[str]):
    """Text from outside. PostgreSQL cannot store NUL, so it is replaced; an id with NUL matches no file."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.replace("\0", "\ufffd")


class _Info(TypeDecorator[AdapterInfo]):
    """An `AdapterInfo` as JSON."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: AdapterInfo | None, dialect: Dialect) -> dict[str, Any] | None:
        return None if value is None else value.to_json()

    def process_result_value(self, value: dict[str, Any] | None, dialect: Dialect) -> AdapterInfo | None:
        return None if value is None else AdapterInfo.of_json(value)


VIDEO, ADAPTER, KEY = "video", "adapter", "key"  # kinds of tombstones
LATE = "late"  # another: the adapter of an attempt that was given up and may still put it into the store
LONGEST_TENANT, LONGEST_LABEL = 128, 64
# Purposes of files that are no videos and have no adapter.
DOCUMENTS = ("batch", "batch_output", "upload_part")
metadata = MetaData()
Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite autoincrements INTEGER columns only

files = Table(
    "files",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),  # upload order: the list's cursor
    Column("id", Text(64), nullable=False, unique=True),
    Column("tenant", String(LONGEST_TENANT), nullable=False),
    Column("filename", Text(1024), nullable=False),
    Column("purpose", Text(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("adapter_name", String(128), nullable=False, index=True),
    Column("previous_adapter", String(128), index=True),  # made under other revisions, kept until the new one is made
    Column("state", String(16), nullable=False),
    Column("progress", Float, nullable=False, default=0.0),
    Column("error_code", String(64)),
    Column("error_message", Text(2048)),
    Column("created_at", Float, nullable=False),
    Column("last_used_at", Float),
    Column("expires_at", Float, index=True),
    Column("idle_seconds", Float),  # if set, each use moves `expires_at`
    Column("pinned", Boolean, nullable=False, server_default=false()),
    Column("ended_at", Float, index=True),
    # Which copy of the bytes in the store this file uses. All live files with the same bytes use one copy.
    Column("generation", String(32), nullable=False, server_default=""),
    Column("from_address", Boolean, nullable=False, server_default=false()),
    sqlite_autoincrement=True,
)
IS_VIDEO = files.c.adapter_name != ""
# A tenant has one file for the same bytes, whatever their address.
_OF_ADDRESS = and_(files.c.from_address.is_(True), files.c.state.in_([literal_column(f"'{state}'") for state in LIVE]))
Index(
    "files_by_address",
    files.c.tenant,
    files.c.sha256,
    unique=True,
    sqlite_where=_OF_ADDRESS,
    postgresql_where=_OF_ADDRESS,
)
Index("files_by_tenant", files.c.tenant, files.c.number)
Index("files_by_state", files.c.state, files.c.tenant, files.c.number)  # whose turn it is, and their oldest file

# An adapter's id is its LoRA int id in every engine. Ids are allocated only here, ascending, and never reused.
adapters = Table(
    "adapters",
    metadata,
    Column("id", Number, primary_key=True, autoincrement=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("rank", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("info", _Info, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_used_at", Float),
    Column("composed", Boolean, nullable=False, server_default=false()),
    Column("generation", String(32), nullable=False, server_default=""),  # the attempt that made it
    sqlite_autoincrement=True,
)

_COMPOSED = adapters.c.composed.is_(True)
Index("adapters_composed", adapters.c.id, sqlite_where=_COMPOSED, postgresql_where=_COMPOSED)

# The parts of each composed adapter, by name, because a part that is made again is still the same part.
parts = Table(
    "parts",
    metadata,
    Column("composed", String(128), primary_key=True),
    Column("part", String(128), primary_key=True, index=True),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Number, primary_key=True, autoincrement=True),
    Column("adapter_name", String(128), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False),
    Column("running", Integer, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("background", Boolean, nullable=False, server_default=false()),  # nobody waits for it
    Column("pool", String(64)),  # the pool that runs it
    Column("token", String(32)),  # the attempt that runs, and no other, may say what becomes of it
    Column("trace", String(64)),  # `traceparent` of the upload that asked for it; null: it was not traced
    Column("created_at", Float, nullable=False),
    sqlite_autoincrement=True,
)
Index("jobs_in_line", jobs.c.running, jobs.c.background, jobs.c.id)

# The pools that run or ran a moment ago.
pools = Table(
    "pools",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("seen_at", Float, nullable=False),
)

# The servers that answer from this catalog or did a moment ago. `applied`: their engine, disk and memory have forgotten
# every deletion up to this tombstone. `heard`: the same, but for adapters that answers still use; null: the server
# takes no keys from the catalog.
servers = Table(
    "servers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("seen_at", Float, nullable=False),
    Column("applied", BigInteger, nullable=False),
    Column("revision", String(128), nullable=False, server_default=""),  # of models and sampling
    Column("heard", BigInteger),
    Column("place", Text, nullable=False, server_default=""),  # host and data folder, for people
)

# What is in the store although no row names it any more, or yet. `done_at` is set once it is removed. Also the keys
# that were revoked, of which nothing is in the store.
tombstones = Table(
    "tombstones",
    metadata,
    Column("seq", Number, primary_key=True, autoincrement=True),
    Column("kind", String(8), nullable=False),
    Column("name", String(128), nullable=False),  # an adapter's name, a video's hash or a key's
    Column("generation", String(32), nullable=False, server_default=""),
    Column("doomed_at", Float, nullable=False),
    Column("reserved", Boolean, nullable=False, server_default=false()),  # an upload writes it and may still name it
    Column("done_at", Float, index=True),
    sqlite_autoincrement=True,
)
Index("tombstones_by_name", tombstones.c.name)

# The bytes of each tenant's live files.
usage = Table(
    "usage",
    metadata,
    Column("tenant", String(LONGEST_TENANT), primary_key=True),
    Column("bytes", BigInteger, nullable=False),
)

# Which models and sampling the files' adapters are made and used with: one row, at most.
serving = Table(
    "serving",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", String(128), nullable=False),
)

# Work that one of all servers does: who, and when it was last done or renewed.
duties = Table(
    "duties",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("taken_at", Float, nullable=False),
    Column("holder", String(64)),
)

# API keys, with `F2L_TENANTS=catalog`.
keys = Table(
    "keys",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("tenant", String(LONGEST_TENANT), nullable=False),
    Column("label", String(LONGEST_LABEL), nullable=False),
    Column("created_at", Float, nullable=False),
)


@dataclass(frozen=True)
class Upload:
    """A received video that becomes a tenant's file.

    Attributes:
        bytes: how many it has.
        expires_seconds: how long after its entry it expires; None: it does not.
        idle_seconds: each use moves its expiry to this many seconds later.
        pinned: it does not expire, and its adapter stays in the hot set.
        from_address: it was named by an address. A tenant has one such file for the same bytes: if there is one, it
            is the file, unless it is `instead_of`.
        trace: the `traceparent` that its job goes on with.
        file_id: the id that its file gets. If there was ever such a file, it is the file, and nothing is entered.
        background: nobody waits for it: it is read when nothing else is to be.
    """

    tenant: str
    sha256: str
    bytes: int
    filename: str
    purpose: str
    expires_seconds: float | None = None
    idle_seconds: float | None = None
    pinned: bool = False
    from_address: bool = False
    instead_of: str | None = None
    trace: str | None = None
    file_id: str | None = None
    background: bool = False


@dataclass(frozen=True)
class FileRecord:
    """One file id of one tenant. Times are Unix seconds; `progress` is 0..1 within the state.

    With `idle_seconds`, each use moves `expires_at`. A pinned file does not expire.
    """

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
    previous_adapter: str | None = None
    last_used_at: float | None = None
    idle_seconds: float | None = None
    pinned: bool = False
    ended_at: float | None = None
    generation: str = ""
    from_address: bool = False

    @property
    def is_document(self) -> bool:
        """Whether it is no video."""
        return self.purpose in DOCUMENTS

    @property
    def video(self) -> str:
        """The name of its bytes in the store."""
        return object_name(self.sha256, self.generation)


@dataclass(frozen=True)
class AdapterRecord:
    """One published adapter; `id` is its LoRA int id."""

    id: int
    name: str
    rank: int
    bytes: int
    info: AdapterInfo
    created_at: float
    last_used_at: float | None = None
    composed: bool = False
    generation: str = ""

    @property
    def object(self) -> str:
        """The name of its files in the store."""
        return object_name(self.name, self.generation)


@dataclass(frozen=True)
class FileWithAdapter:
    """A file, and the adapter it is answered from once it is processed."""

    file: FileRecord
    adapter: AdapterRecord | None


@dataclass(frozen=True)
class Job:
    """One adapter to be made, whoever waits for it.

    Attributes:
        attempts: how many there were, this one included.
        generation: the copy of the video's bytes to read.
        token: identifies this attempt.
        trace: the `traceparent` of the upload that asked for it.
    """

    adapter_name: str
    sha256: str
    attempts: int
    generation: str = ""
    token: str = ""
    trace: str | None = None

    @property
    def object(self) -> str:
        """The name of the files that this attempt puts into the store."""
        return object_name(self.adapter_name, self.token)

    @property
    def video(self) -> str:
        """The name of the video's bytes in the store."""
        return object_name(self.sha256, self.generation)


@dataclass(frozen=True)
class Tombstone:
    """What has to be removed from the store, one copy of an adapter or of a video's bytes, or a key that every server
    has to forget."""

    seq: int
    kind: str
    name: str
    generation: str = ""

    @property
    def is_video(self) -> bool:
        """Whether it is a video's bytes."""
        return self.kind == VIDEO

    @property
    def is_key(self) -> bool:
        """Whether it is a key, by its hash."""
        return self.kind == KEY

    @property
    def object(self) -> str:
        """The name in the store."""
        return object_name(self.name, self.generation)


@dataclass(frozen=True)
class KeyRecord:
    """One API key by its SHA-256 in hex; `label` is for people, `created_at` Unix seconds."""

    sha256: str
    tenant: str
    label: str
    created_at: float


@dataclass(frozen=True)
class Bytes:
    """Where an upload's bytes are, or have to be put, before its file is entered.

    Attributes:
        is_new: no file names them yet, so the upload has to put them there.
        replaces: a missing or damaged copy; all files with the same bytes switch from it to this one.
    """

    sha256: str
    generation: str
    is_new: bool
    replaces: str | None = None

    @property
    def video(self) -> str:
        """Their name in the store."""
        return object_name(self.sha256, self.generation)
