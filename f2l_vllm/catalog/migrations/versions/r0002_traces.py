"""A job carries the trace of the upload that asked for it."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "r0002", "r0001"


def upgrade() -> None:
    """Add the column, which is empty where nobody traces."""
    op.add_column("jobs", sa.Column("trace", sa.String(64)))
