import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from f2l_vllm import logs
from f2l_vllm.catalog.catalog import Catalog
from tests.support.postgres import Postgres, temporary_postgres


@pytest.fixture(autouse=True)
def logging_as_at_the_start() -> Iterator[None]:
    """What a test, or a library on import, sets for the whole process holds for no other test."""
    root, *others = loggers = [logging.getLogger(name) for name in (None, "f2l_vllm", "vllm")]
    root.setLevel(logging.WARNING)
    for logger in others:
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    yield
    for logger in loggers:
        for handler in [handler for handler in logger.handlers if isinstance(handler, logs.Handler)]:
            logger.removeHandler(handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One real server for the session."""
    with temporary_postgres() as server:
        if server is None:
            pytest.skip("PostgreSQL is not installed: no initdb and postgres on the PATH or under /usr/lib/postgresql")
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'catalog.sqlite3'}"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def catalog(database_url: str) -> Iterator[Catalog]:
    """An empty catalog in each kind of database."""
    catalog = Catalog(database_url)
    yield catalog
    catalog.close()
