"""A catalog of an earlier version is opened, whole, by one of those that come at once; that of a newer one is not."""

import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, event, inspect, make_url, text

from f2l_vllm.catalog import schema
from f2l_vllm.catalog.batch_tables import BatchState
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.database import check_reachable
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import metadata
from f2l_vllm.store.errors import StoreUnavailable
from tests.support import ROOT
from tests.support.catalog_steps import add, claim

STORED = Path(__file__).with_name("stored")  # what f2l-vllm 0.1.0 left, as SQL


@pytest.fixture
def stored_url(database_url: str) -> str:
    """A catalog of f2l-vllm 0.1.0: two videos answered, one in work, one waiting, one deleted; one of them pinned."""
    if database_url.startswith("sqlite"):
        with sqlite3.connect(make_url(database_url).database) as connection:
            connection.executescript((STORED / "0.1.0-sqlite.sql").read_text())
        connection.close()
    else:
        with psycopg.connect(database_url) as connection:
            connection.execute((STORED / "0.1.0-postgresql.sql").read_text())
    return database_url


def engine_of(url: str) -> Engine:
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:"))


def shape(url: str) -> dict[str, object]:
    """Every table with its columns and indexes."""
    engine = engine_of(url)
    found = inspect(engine)
    tables = {table: (found.get_columns(table), found.get_indexes(table)) for table in found.get_table_names()}
    engine.dispose()
    return {
        table: (
            sorted((one["name"], str(one["type"]), one["nullable"], one["default"]) for one in columns),
            sorted((one["name"], one["column_names"], one["unique"], conditions(one)) for one in indexes),
        )
        for table, (columns, indexes) in tables.items()
    }


def conditions(index) -> list[str]:
    return [str(index["dialect_options"][key]) for key in index.get("dialect_options", {}) if key.endswith("_where")]


def test_a_catalog_of_0_1_0_goes_on_where_it_was(stored_url):
    catalog = Catalog(stored_url)
    records, _ = catalog.files("t", after=None, limit=9, descending=False)
    assert [(r.filename, r.state.value, r.pinned) for r in records] == [
        ("first.mp4", "processed", True),
        ("second.mp4", "processed", False),
        ("waiting.mp4", "uploaded", False),
    ]
    assert catalog.stored_bytes("t") == 9
    first, second, waiting = records
    assert [adapter.id for adapter in catalog.adapters_of([first, second]).values()] == [1, 2]
    assert first.video == first.sha256  # stored before copies had names
    assert catalog.adopt(lambda sha256: f"f2l-{sha256[0]}", lambda _video: True) == (0, 0)
    assert [one.object for one in catalog.tombstones(9)] == [f"{'e' * 64}.{deleted_generation(stored_url)}"]
    assert claim(catalog).adapter_name == waiting.adapter_name
    assert add(catalog, "f2l-f", "f", from_address=True).state is VideoState.UPLOADED
    assert add(catalog, "f2l-f", "f", from_address=True).number == 6
    assert [removed.object for removed in catalog.remove_file(first.id, "t").doomed if removed.is_video] == ["a" * 64]
    assert catalog.add_key("news")
    batch = catalog.add_batch("t", "/v1/responses", second.id, seconds=60, limit=1, details={"metadata": {"a": "b"}})
    batch = catalog.move_batch(batch, BatchState.IN_PROGRESS, total=1)
    assert catalog.add_answer(batch, 1, "answer", is_success=True)
    assert catalog.open_batches() == [catalog.batch(batch.id, "t")]
    assert catalog.begin_upload("t", 9, "v.mp4", "vision", (None, None), limit=1).status == "pending"
    catalog.close()


def deleted_generation(url: str) -> str:
    engine = engine_of(url)
    with engine.connect() as connection:
        generation = connection.scalar(text("SELECT generation FROM files WHERE filename = 'deleted.mp4'"))
    engine.dispose()
    return generation


@pytest.mark.parametrize("is_new", [False, True])
def test_the_steps_end_at_the_tables_of_this_version(request, database_url, is_new):
    url = database_url if is_new else request.getfixturevalue("stored_url")
    Catalog(url).close()
    engine = engine_of(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_catalog_that_was_brought_here_is_like_a_new_one(stored_url, tmp_path, request):
    Catalog(stored_url).close()
    is_file = stored_url.startswith("sqlite")
    new = f"sqlite:///{tmp_path / 'new'}" if is_file else request.getfixturevalue("postgres").new_database()
    Catalog(new).close()
    assert shape(stored_url) == shape(new)


def test_of_servers_that_start_at_once_one_takes_the_steps(stored_url, caplog):
    caplog.set_level("INFO", "f2l_vllm.catalog.schema")
    begin = threading.Barrier(4)

    def start(_number):
        begin.wait()
        catalog = Catalog(stored_url)
        files = catalog.counts()[0]
        catalog.close()
        return files

    with ThreadPoolExecutor(4) as threads:
        assert len({str(found) for found in threads.map(start, range(4))}) == 1
    assert [record.message for record in caplog.records if "tables are of" in record.message] == [
        f"the catalog's tables are of version {schema.KNOWN[-1]} now; they were of f2l-vllm 0.1"
    ]


def test_a_catalog_of_a_newer_version_is_refused_and_left_alone(database_url):
    Catalog(database_url).close()
    engine = engine_of(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'r9999'"))
    engine.dispose()
    for opening in (Catalog, check_reachable):
        with pytest.raises(schema.NewerCatalog, match=r"version r9999, and this one knows them up to r\d+; install"):
            opening(database_url)


def test_steps_that_fail_leave_the_catalog_as_it_was(stored_url, monkeypatch):
    before = shape(stored_url)
    monkeypatch.setattr(schema, "create_triggers", lambda connection: connection.execute(text("SELECT nothing")))
    with pytest.raises(Exception, match="nothing"):
        Catalog(stored_url)
    assert shape(stored_url) == before
    monkeypatch.undo()
    Catalog(stored_url).close()
    assert shape(stored_url) != before


def test_a_full_disk_leaves_the_catalog_as_it_was(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'catalog.sqlite3'}"
    with sqlite3.connect(tmp_path / "catalog.sqlite3") as connection:
        connection.executescript((STORED / "0.1.0-sqlite.sql").read_text())
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.close()
    before, full = shape(url), lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 1}")
    event.listen(Engine, "begin", full)
    try:
        with pytest.raises(StoreUnavailable, match="no room is left") as error:
            Catalog(url)
    finally:
        event.remove(Engine, "begin", full)
    assert error.value.full
    assert shape(url) == before
    Catalog(url).close()


def test_a_read_only_catalog_that_needs_steps_says_so(stored_url):
    if stored_url.startswith("sqlite"):
        read_only = stored_url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true"
    else:
        read_only = stored_url + "&options=-c%20default_transaction_read_only%3Don"
    before = shape(stored_url)
    with pytest.raises(StoreUnavailable, match="cannot be read or written"):
        Catalog(read_only)
    assert shape(stored_url) == before


def test_only_steps_load_alembic(tmp_path):
    code = (
        "import sys; from f2l_vllm.catalog.catalog import Catalog\n"
        "for _ in range(2): Catalog(sys.argv[1]).close()\n"
        "assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, f"sqlite:///{tmp_path / 'catalog'}"], cwd=ROOT, check=True)
