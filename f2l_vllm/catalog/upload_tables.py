"""The table of files that come in parts."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import BigInteger, Column, Float, String, Table

from f2l_vllm.catalog import tables
from f2l_vllm.catalog.batch_tables import metadata
from f2l_vllm.catalog.tables import LONGEST_TENANT

__all__ = ["PartialUpload", "metadata", "uploads"]

LASTING_SECONDS = 3600.0

# The parts of each are files of the tenant that has the upload's id for its name.
uploads = Table(
    "uploads",
    metadata,
    Column("id", tables.Text(64), primary_key=True),
    Column("tenant", String(LONGEST_TENANT), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("filename", tables.Text(1024), nullable=False),
    Column("purpose", tables.Text(32), nullable=False),
    Column("created_at", Float, nullable=False, index=True),
    Column("expires_seconds", Float),
    Column("idle_seconds", Float),
    Column("status", String(16), nullable=False),
    Column("file_id", tables.Text(64)),
)


@dataclass(frozen=True)
class PartialUpload:
    """A file that comes in parts; `status` is pending, completed or cancelled, as OpenAI's clients know it.

    `expires_seconds` and `idle_seconds` are those of the file that it becomes.
    """

    id: str
    tenant: str
    bytes: int
    filename: str
    purpose: str
    created_at: float
    expires_seconds: float | None = None
    idle_seconds: float | None = None
    status: str = "pending"
    file_id: str | None = None

    @property
    def expires_at(self) -> float:
        """When it is forgotten, Unix seconds."""
        return self.created_at + LASTING_SECONDS
