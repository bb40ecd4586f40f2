"""What servers of one catalog tell each other."""

import threading
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import update

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import files, servers
from tests.support.catalog_steps import add, publish


def silence(catalog, server):
    with catalog._write() as connection:
        connection.execute(update(servers).where(servers.c.id == server).values(seen_at=0.0))


def test_deletions_are_told_in_their_order_and_waited_for(catalog):
    one, newest = catalog.join_server("one", "r")
    assert newest == 0
    assert catalog.beat_server(one, 0)
    record = add(catalog)
    publish(catalog)
    doomed = catalog.remove_file(record.id, "t").doomed
    told = catalog.deletions_after(0, 10)
    assert sorted(one.seq for one in doomed) == [one.seq for one in told]
    assert catalog.deletions_after(told[0].seq, 10) == told[1:]
    numbers = [one.seq for one in doomed]
    assert not catalog.is_erased(numbers)
    catalog.beat_server(one, max(numbers))
    assert not catalog.is_erased(numbers)  # it is in the store still
    catalog.bury(doomed)
    assert catalog.is_erased(numbers)
    two, newest = catalog.join_server("two", "r")
    assert newest == max(numbers)
    assert not catalog.is_erased(numbers)  # who comes later has to have compared, too
    catalog.leave_server(two)
    assert catalog.is_erased(numbers)
    assert catalog.is_erased([])


def test_a_silent_server_is_given_up_and_hears_of_it(catalog):
    one, _ = catalog.join_server("one", "r")
    two, _ = catalog.join_server("two", "r")
    silence(catalog, two)
    assert not catalog.beat_server(two, 5)
    assert catalog.beat_server(one, 5)
    assert not catalog.beat_server(two, 5)


def test_a_server_that_joins_takes_the_place_of_an_earlier_one_of_its_name(catalog):
    one, _ = catalog.join_server("o%", "r")
    other, _ = catalog.join_server("on", "r")
    again, _ = catalog.join_server("o%", "r")
    assert not catalog.beat_server(one, 5)
    assert catalog.beat_server(again, 5)
    assert catalog.beat_server(other, 5)


def test_the_revision_that_answers_changes_when_its_servers_are_gone_or_by_order(catalog):
    one, _ = catalog.join_server("one", "r")
    assert catalog.is_appointed("r")
    two, _ = catalog.join_server("two", "s")
    assert not catalog.is_appointed("s")
    assert catalog.revisions() == ("r", {"r": 1, "s": 1})
    silence(catalog, one)
    assert catalog.is_appointed("s")
    assert not catalog.is_appointed("r")
    catalog.appoint("r")
    assert catalog.is_appointed("r")
    catalog.leave_server(two)
    assert catalog.revisions() == ("r", {})


def test_the_same_bytes_at_whatever_address_are_one_file_of_a_tenants(catalog):
    first = add(catalog, from_address=True)
    assert add(catalog, from_address=True, filename="other.mp4") == first
    assert catalog.file_of_address("t", first.sha256) == first
    assert add(catalog).id != first.id  # an upload is a file of its own
    assert add(catalog, tenant="other", from_address=True).id != first.id
    instead = add(catalog, from_address=True, instead_of=first.id)
    assert instead.id != first.id
    assert catalog.file_of_address("t", first.sha256) == instead
    catalog.remove_file(instead.id, "t")
    assert catalog.file_of_address("t", first.sha256) is None
    late = add(catalog, from_address=True, expires_seconds=-1.0)
    assert catalog.file_of_address("t", first.sha256) is None  # it is due
    assert add(catalog, from_address=True).id != late.id


def test_servers_that_fetch_the_same_bytes_at_once_enter_one_file(database_url):
    start = threading.Barrier(6)

    def fetch(_number):
        catalog = Catalog(database_url)
        video = catalog.reserve_video("a" * 64)
        start.wait()
        record = add(catalog, from_address=True, video=video)
        catalog.close()
        return record.id

    with ThreadPoolExecutor(6) as threads:
        assert len(set(threads.map(fetch, range(6)))) == 1
    catalog = Catalog(database_url)
    with catalog._read() as connection:
        assert len(connection.execute(files.select()).all()) == 1
    assert catalog.stored_bytes("t") == 3
    assert len(catalog.deletions_after(0, 10)) == 5  # the reservations of the others
    catalog.close()


def test_an_address_whose_file_failed_may_have_another(catalog):
    first = add(catalog, from_address=True)
    catalog.claim_jobs(1)
    catalog.fail_job("f2l-1", "internalization_failed", "it failed")
    assert catalog.file_of_address("t", first.sha256).state is VideoState.ERROR
    again = add(catalog, from_address=True, instead_of=first.id)
    assert {again.id, first.id} == {
        record.id for record in catalog.files("t", after=None, limit=9, descending=False)[0]
    }
