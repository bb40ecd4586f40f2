"""Brings a catalog's tables to those of this version. Alembic runs the steps, one file each, in `migrations/versions/`.

A new catalog gets the tables of `tables.py` at once. One that has tables and no version is of f2l-vllm 0.1.0. All steps
run in the caller's one transaction, in SQLite as in PostgreSQL, so a catalog is never left between two versions.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sqlalchemy import Column, Connection, MetaData, String, Table, insert, inspect, select, text

from f2l_vllm.catalog.notices import create_triggers
from f2l_vllm.catalog.stream_tables import metadata  # with every table

logger = logging.getLogger(__name__)

STEPS = Path(__file__).with_name("migrations")
KNOWN = sorted(path.stem.split("_")[0] for path in (STEPS / "versions").glob("r*.py"))
"""The versions of the tables, oldest first; the last is that of `tables.py`."""
_VERSION = Table(
    "alembic_version", MetaData(), Column("version_num", String(32), primary_key=True)
)  # as Alembic has it


class NewerCatalog(ValueError):
    """The catalog was opened by a newer f2l-vllm, which gave it tables that this one does not know."""


def version_of(connection: Connection) -> str | None:
    """The version of the catalog's tables; None: it has none, or no tables.

    Raises:
        NewerCatalog: this f2l-vllm does not know it.
    """
    if not inspect(connection).has_table(_VERSION.name):
        return None
    version = connection.scalar(select(_VERSION.c.version_num))
    if version is not None and version not in KNOWN:
        raise NewerCatalog(
            f"the catalog was opened by a newer f2l-vllm: its tables are of version {version}, and this one knows them "
            f"up to {KNOWN[-1]}; install the newer f2l-vllm again, or name another catalog with F2L_DATABASE_URL"
        )
    return version


def bring_up_to_date(connection: Connection) -> None:
    """Make or change tables, indexes and triggers as this version has them. The caller excludes all other writers.

    Raises:
        NewerCatalog: as in `version_of`.
    """
    version = version_of(connection)
    if version == KNOWN[-1]:
        return
    if version is None and not inspect(connection).has_table("files"):
        metadata.create_all(connection)
        _VERSION.create(connection, checkfirst=True)
        connection.execute(insert(_VERSION).values(version_num=KNOWN[-1]))
    else:
        _run_steps(connection)
        logger.info("the catalog's tables are of version %s now; they were of %s", KNOWN[-1], version or "f2l-vllm 0.1")
    create_triggers(connection)


def _run_steps(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":  # which would take Alembic's loading for a process that hangs
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '60s'"))
    from alembic import command  # few starts need it
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(STEPS).replace("%", "%%"))
    command.upgrade(config, "head")
