"""From f2l-vllm 0.1.0: several servers at one catalog, files by address, keys, an attempt's own name in the store."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "r0001", None


def upgrade() -> None:
    """Add what 0.1.0 lacks, and a development version before this step may have."""
    add("files", sa.Column("from_address", sa.Boolean, nullable=False, server_default=sa.false()))
    add("adapters", sa.Column("generation", sa.String(32), nullable=False, server_default=""))
    add("jobs", sa.Column("token", sa.String(32)))
    add("duties", sa.Column("holder", sa.String(64)))
    op.create_table(
        "servers",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("seen_at", sa.Float, nullable=False),
        sa.Column("applied", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.String(128), nullable=False, server_default=""),
        sa.Column("heard", sa.BigInteger),
        sa.Column("place", sa.String, nullable=False, server_default=""),
        if_not_exists=True,
    )
    add("servers", sa.Column("heard", sa.BigInteger))
    add("servers", sa.Column("place", sa.String, nullable=False, server_default=""))
    op.create_table(
        "serving",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("revision", sa.String(128), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "keys",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        if_not_exists=True,
    )
    live = sa.text("state IN ('uploaded', 'decoding', 'encoding', 'publishing', 'processed', 'error')")
    address = sa.and_(sa.column("from_address").is_(sa.true()), live)
    op.create_index(
        "files_by_address",
        "files",
        ["tenant", "sha256"],
        unique=True,
        sqlite_where=address,
        postgresql_where=address,
        if_not_exists=True,
    )


def add(table: str, column: sa.Column[object]) -> None:
    """Add a column that is not there."""
    if column.name not in {known["name"] for known in sa.inspect(op.get_bind()).get_columns(table)}:
        op.add_column(table, column)
