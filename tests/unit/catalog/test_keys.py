"""Keys in the catalog: what is kept of them, and who has to hear that one was revoked."""

import re
import time

from sqlalchemy import text, update

from f2l_vllm.catalog.keys import key_hash
from f2l_vllm.catalog.tables import servers
from tests.support.catalog_steps import add, publish


def revoked(catalog, key):
    number = catalog.revoke_key(key_hash(key))
    assert number is not None
    return number


def test_a_key_is_said_once_and_only_its_hash_is_kept(catalog):
    one, other = catalog.add_key("news", "laptop"), catalog.add_key("news")
    assert re.fullmatch("sk-f2l-[A-Za-z0-9_-]{43}", one)
    first, second = catalog.api_keys()
    assert (first.sha256, first.tenant, first.label) == (key_hash(one), "news", "laptop")
    assert abs(first.created_at - time.time()) < 60
    assert (second.sha256, second.label) == (key_hash(other), "")
    with catalog._read() as connection:
        assert one not in str(connection.execute(text("SELECT * FROM keys")).all())


def test_a_revoked_key_is_told_to_servers_and_not_looked_for_in_the_store(catalog):
    key, kept = catalog.add_key("news"), catalog.add_key("news")
    number = revoked(catalog, key)
    assert [one.sha256 for one in catalog.api_keys()] == [key_hash(kept)]
    (told,) = catalog.deletions_after(0, 10)
    assert (told.seq, told.is_key, told.is_video, told.name) == (number, True, False, key_hash(key))
    assert catalog.tombstones(10) == []
    assert catalog.is_erased([number])
    assert catalog.revoke_key(key_hash(key)) is None
    catalog.purge(time.time() + 60)
    assert catalog.deletions_after(0, 10) == []


def test_a_revocation_waits_for_the_servers_that_run(catalog):
    one, _ = catalog.join_server("one", "r", "host:/one")
    two, _ = catalog.join_server("two", "r", "host:/two")
    key = catalog.add_key("news")
    number = revoked(catalog, key)
    assert catalog.unaware(number) == ["host:/one", "host:/two"]
    catalog.beat_server(one, number, number)
    catalog.beat_server(two, number - 1, number - 1)
    assert catalog.unaware(number) == ["host:/two"]
    with catalog._write() as connection:
        connection.execute(update(servers).where(servers.c.id == two).values(seen_at=0.0))
    assert catalog.unaware(number) == []
    three, _ = catalog.join_server("three", "r", "host:/three")
    assert catalog.unaware(number) == ["host:/three"]  # it has to compare first
    catalog.leave_server(three)
    assert catalog.unaware(number) == []


def test_a_revocation_waits_for_no_answer_from_a_deleted_adapter(catalog):
    server, _ = catalog.join_server("one", "r")
    record = add(catalog)
    publish(catalog)
    doomed = [one.seq for one in catalog.remove_file(record.id, "t").doomed]
    number = revoked(catalog, catalog.add_key("news"))
    catalog.beat_server(server, min(doomed) - 1, number)
    assert catalog.unaware(number) == []
    assert not catalog.is_erased(doomed)
