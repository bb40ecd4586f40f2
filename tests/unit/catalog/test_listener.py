"""Hearing the catalog's notices, and knowing when they are not heard."""

import socket
import threading
import time

import pytest

from f2l_vllm.catalog import listener as module
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import check_url, listen
from f2l_vllm.store.adapter_info import AdapterInfo
from tests.support.catalog_steps import add, claim
from tests.support.pgbouncer import find_pgbouncer, pooled


class Ear:
    """A listener, and how often each payload came."""

    def __init__(self, catalog, url=None):
        self.listener = listen(catalog, url)
        self.heard = {}
        for payload in ("jobs", "files", "deletions"):
            self.listener.on(payload, lambda payload=payload: self.count(payload))

    def count(self, payload):
        self.heard[payload] = self.heard.get(payload, 0) + 1


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def catalog(postgres):
    catalog = Catalog(postgres.new_database(), busy_seconds=5)
    yield catalog
    catalog.close()


@pytest.fixture
def ear(catalog):
    ear = Ear(catalog)
    yield ear
    ear.listener.close()


def test_changes_are_heard_within_a_moment(catalog, ear):
    until(lambda: ear.listener.is_heard)
    ear.heard.clear()
    started = time.monotonic()
    record = add(catalog)
    until(lambda: ear.heard == {"jobs": 1})
    assert time.monotonic() - started < 7.0  # half of what it would take without the notice
    catalog.remove_file(record.id, "t")
    until(lambda: ear.heard == {"jobs": 1, "files": 1, "deletions": 1})


def test_a_callback_that_fails_ends_nothing(catalog, ear):
    until(lambda: ear.listener.is_heard)
    ear.heard.clear()
    ear.listener._callbacks["jobs"].insert(0, lambda: 1 / 0)
    add(catalog)
    until(lambda: ear.heard == {"jobs": 1})
    assert ear.listener.is_heard


def test_a_server_that_was_restarted_is_heard_again(postgres, catalog, ear):
    until(lambda: ear.listener.is_heard)
    postgres.stop()
    try:
        until(lambda: not ear.listener.is_heard)
        ear.heard.clear()
    finally:
        postgres.start()
    until(lambda: ear.listener.is_heard)
    assert ear.heard == {"jobs": 1, "files": 1, "deletions": 1}  # something may have been missed
    ear.heard.clear()
    add(catalog)
    until(lambda: ear.heard == {"jobs": 1})


def test_a_connection_that_falls_silent_is_noticed_and_replaced(monkeypatch, catalog):
    monkeypatch.setattr(module, "_PROOF_SECONDS", 0.3)
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(module, "_UNHEARD_SECONDS", 0.5)
    sent, lost = catalog.notify, threading.Event()
    monkeypatch.setattr(catalog, "notify", lambda *notice: None if lost.is_set() else sent(*notice))
    ear = Ear(catalog)
    until(lambda: ear.listener.is_heard)
    time.sleep(1.0)
    assert ear.listener.is_heard
    lost.set()
    until(lambda: not ear.listener.is_heard, 3.0)
    lost.clear()
    until(lambda: ear.listener.is_heard)
    ear.listener.close()


def test_a_listener_that_hangs_is_not_believed(monkeypatch, catalog):
    monkeypatch.setattr(module, "_PROOF_SECONDS", 0.2)
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.2)
    sent, hangs, goes_on = catalog.notify, threading.Event(), threading.Event()

    def notify(*notice):
        if hangs.is_set():
            goes_on.wait(30)
        sent(*notice)

    monkeypatch.setattr(catalog, "notify", notify)
    ear = Ear(catalog)
    until(lambda: ear.listener.is_heard)
    hangs.set()
    until(lambda: not ear.listener.is_heard, 3.0)
    goes_on.set()
    ear.listener.close()


def test_it_ends_promptly_heard_or_not(postgres, catalog):
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for url in (None, f"postgresql://f2l@127.0.0.1:{silent.getsockname()[1]}/any"):
            ear = Ear(catalog, url)
            if url is None:
                until(lambda ear=ear: ear.listener.is_heard)
            started = time.monotonic()
            ear.listener.close()
            assert time.monotonic() - started < 10.0
            assert url is not None or not ear.listener._thread.is_alive()


@pytest.mark.skipif(find_pgbouncer() is None, reason="pgbouncer is not installed")
def test_behind_a_pooler_that_swallows_notices_nothing_is_believed_heard(postgres, caplog):
    direct = postgres.new_database()
    with pooled(direct) as url:
        catalog = Catalog(url)
        with caplog.at_level("INFO", "f2l_vllm.catalog.listener"):
            ear = Ear(catalog)
            until(lambda: caplog.records)
        assert "F2L_LISTEN_URL" in caplog.text
        assert not ear.listener.is_heard
        add(catalog)
        assert claim(catalog).adapter_name == "f2l-1"
        time.sleep(0.3)
        assert (ear.heard, ear.listener.is_heard) == ({}, False)
        past = Ear(catalog, direct)
        until(lambda: past.listener.is_heard)
        past.heard.clear()
        catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo())
        until(lambda: past.heard == {"files": 1})
        for one in (ear, past):
            one.listener.close()
        catalog.close()


def test_another_database_is_never_believed_heard(monkeypatch, postgres, catalog):
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.3)
    ear = Ear(catalog, postgres.new_database())
    time.sleep(1.0)
    assert not ear.listener.is_heard
    ear.listener.close()


def test_sqlite_has_no_listener(tmp_path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    assert listen(catalog) is None
    catalog.close()


@pytest.mark.parametrize(
    ("url", "catalog_url", "message"),
    [
        ("not a url", "postgresql://host/name", "F2L_LISTEN_URL is no database URL"),
        ("mysql://host/name", "postgresql://host/name", "leads to the same database"),
        ("postgresql://host/name", "sqlite:///name", "for a catalog in PostgreSQL"),
    ],
)
def test_a_place_where_nothing_can_be_heard_is_refused(url, catalog_url, message):
    check_url(None, catalog_url)
    check_url("postgresql://direct/name", "postgresql+psycopg://host/name")
    with pytest.raises(ValueError, match=message):
        check_url(url, catalog_url)
