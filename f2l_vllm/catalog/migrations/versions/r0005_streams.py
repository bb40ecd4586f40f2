"""Live streams, their pieces and the questions asked of each piece."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "r0005", "r0004"
_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Add their tables."""
    op.create_table(
        "streams",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.Column("segment_seconds", sa.Float, nullable=False),
        sa.Column("window_seconds", sa.Float, nullable=False),
        sa.Column("keep_seconds", sa.Float),
        sa.Column("idle_seconds", sa.Float, nullable=False),
        sa.Column("expires_seconds", sa.Float),
        sa.Column("becomes_file", sa.Boolean, nullable=False),
        sa.Column("source", sa.String(2048)),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("clock_offset", sa.Float),
        sa.Column("origin", sa.Float),
        sa.Column("head", sa.Float),
        sa.Column("received_at", sa.Float),
        sa.Column("segments", sa.Integer, nullable=False, server_default="0"),
        sa.Column("init", sa.LargeBinary),
        sa.Column("file_id", sa.String(64)),
        sqlite_autoincrement=True,
    )
    op.create_index("streams_by_tenant", "streams", ["tenant", "number"])
    op.create_table(
        "pieces",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("stream", sa.String(64), nullable=False),
        sa.Column("level", sa.Integer, nullable=False),
        sa.Column("slot", _NUMBER, nullable=False),
        sa.Column("start", sa.Float, nullable=False),
        sa.Column("end", sa.Float, nullable=False),
        sa.Column("spans", sa.JSON, nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("file_id", sa.String(64), nullable=False, unique=True),
        sa.Column("received_at", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("pieces_by_stream", "pieces", ["stream", "number"])
    op.create_table(
        "watches",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("stream", sa.String(64), nullable=False, index=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("question", sa.JSON, nullable=False),
        sa.Column("webhook", sa.String(2048)),
        sa.Column("secret", sa.String(128)),
        sa.Column("asked_to", sa.Float, nullable=False),
        sa.Column("sent_to", _NUMBER, nullable=False, server_default="0"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "watch_answers",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("watch", sa.String(64), nullable=False),
        sa.Column("file_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.UniqueConstraint("watch", "file_id", name="one_answer_of_each_segment"),
        sqlite_autoincrement=True,
    )
