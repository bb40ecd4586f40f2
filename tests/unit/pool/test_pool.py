"""How a pool stops, with lanes and actors that need no Ray."""

import threading
from types import SimpleNamespace

import pytest

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.pool.config import PoolConfig
from f2l_vllm.pool.pool import Pool
from f2l_vllm.store.store import Store


@pytest.mark.parametrize("is_late", [False, True])
def test_ray_is_not_shut_down_under_a_lane_that_is_still_in_it(tmp_path, monkeypatch, is_late):
    """Ray would end this process at once."""
    monkeypatch.setattr("f2l_vllm.pool.pool._LANE_SECONDS", 0.05)
    called, end = [], threading.Event()
    actors = SimpleNamespace(
        new=None,
        missing=None,
        connect=lambda: called.append("connect"),
        disconnect=lambda: called.append("disconnect"),
    )
    config = PoolConfig(1, cpus=1, gpus=0, ray_address=None, job_attempts=1, job_seconds=60)
    pool = Pool(config, actors, Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}"), Store(tmp_path))
    (lane,) = pool._lanes
    lane.run = end.wait if is_late else lambda: None
    assert pool.start()
    try:
        pool.stop()
        assert called == ["connect"] + ["disconnect"] * (not is_late)
        assert not pool._lock.is_locked
    finally:
        end.set()
        lane.join()
