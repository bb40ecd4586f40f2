"""Uploads in parts are taken by any server."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "r0004", "r0003"


def upgrade() -> None:
    """Add their table."""
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False, index=True),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("filename", sa.String(1024), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False, index=True),
        sa.Column("expires_seconds", sa.Float),
        sa.Column("idle_seconds", sa.Float),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("file_id", sa.String(64)),
    )
