"""Hypernetwork workers in Ray Serve: they come with videos and go without losing one. Ray and PostgreSQL are real."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray import serve

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.cluster.workers import Args, build
from tests.e2e.pool.test_pool import hanging_decoders, until
from tests.e2e.pool.test_workers import Site
from tests.support import fake_worker
from tests.support.postgres import temporary_postgres

REPOSITORY = Path(__file__).parents[3]


@contextmanager
def ray_serve(folder: Path, site: Site, seconds: float | None):
    """Ray and Serve on this machine. `seconds`: what a video takes a worker without a model; None: a real worker."""
    settings = {
        "F2L_HOME": str(folder / "nodes"),
        "F2L_DATABASE_URL": site.database,
        "F2L_STORE": site.far_url,
        "F2L_WORKER_CPUS": "0.5",
        "F2L_JOB_SECONDS": "60",
        "PYTHONPATH": str(REPOSITORY),
        fake_worker.SECONDS: str(seconds),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr("f2l_vllm.cluster.workers._PATIENCE_SECONDS", 3.0)
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            runtime_env={} if seconds is None else {"worker_process_setup_hook": fake_worker.install},
        )
        try:
            serve.start(proxy_location="Disabled")
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def site(tmp_path, hypernetwork_model):
    with temporary_postgres() as postgres:
        if postgres is None:
            pytest.skip("PostgreSQL is not installed")
        site = Site(tmp_path, hypernetwork_model, postgres.new_database())
        yield site
        site.catalog.close()


def start(site: Site) -> None:
    serve.run(build(Args(model=str(site.model), most=3)), name="workers", route_prefix=None)


def replicas() -> dict[str, int]:
    """How many there are in each state."""
    return dict(serve.status().applications["workers"].deployments["Hypernetwork"].replica_states)


def pids(name: str, folder: Path) -> list[int]:
    """Ray's processes of this name whose data folder is below this one: other tests may run on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = f"F2L_HOME={folder}".encode() in (entry / "environ").read_bytes()
            if is_ours and (entry / "cmdline").read_text().startswith(f"ray::{name}"):
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def test_workers_come_with_videos_survive_kills_and_go_without_losing_one(site, tmp_path):
    with ray_serve(tmp_path, site, seconds=1.0):
        start(site)
        assert replicas() == {}
        records = [site.upload(f"{number}", frames=4 + number) for number in range(6)]
        until(lambda: sum(replicas().values()) == 3)
        until(lambda: VideoState.DECODING in map(site.state, records))
        os.kill(pids("ServeReplica:workers:Hypernetwork", tmp_path)[0], signal.SIGKILL)
        until(lambda: {site.state(record) for record in records} == {VideoState.PROCESSED})
        until(lambda: replicas() == {})
        site.tidy()
        assert {site.catalog.adapter(f"f2l-{number}").object for number in range(6)} == site.published()
        assert not [path for path in (tmp_path / "nodes").rglob("*/videos/*/*") if path.is_file()]


def test_a_real_worker_that_is_stopped_finishes_its_video_first_and_removes_what_a_killed_one_left(site, tmp_path):
    left = tmp_path / "nodes/workers/7/videos/ab" / f"{'ab' * 32}.{'0' * 16}"
    with ray_serve(tmp_path, site, seconds=None):
        start(site)
        first = site.upload("first")
        until(lambda: site.state(first) is VideoState.PROCESSED)
        with hanging_decoders(*pids("HypernetworkWorker", tmp_path)):
            second = site.upload("second", frames=40)
            until(lambda: site.state(second) is VideoState.DECODING)
            left.parent.mkdir(parents=True)
            left.touch()
            stopping = threading.Thread(target=serve.delete, args=("workers",))
            stopping.start()
            time.sleep(3.0)
            assert stopping.is_alive()
            assert site.state(second) is VideoState.DECODING
            assert left.exists()
        stopping.join()
        assert site.state(second) is VideoState.PROCESSED
        assert site.catalog.adapter("f2l-second").object in site.published()
        assert not left.exists()
