"""Servers that share a catalog and a store: what one deletes is never what another has just accepted."""

from benchmarks.shared_store import run


def test_a_delete_never_takes_another_servers_fresh_upload_of_the_same_bytes(postgres, tmp_path):
    found = run(postgres.new_database(), tmp_path, pairs=200, servers=2, clients=4, videos=2, latency=0.01)
    assert found["pairs"] == 200
    assert (found["lost"], found["objects_left"]) == (0, 0)
