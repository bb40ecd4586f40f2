"""`f2l-vllm workers`: programs that read videos without a server, each with a folder as on a machine of its own."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.cli.workers import plan
from f2l_vllm.server_process import free_port
from f2l_vllm.store.cached_store import open_store
from tests.e2e.pool.test_pool import decoders, hanging_decoders, until
from tests.e2e.pool.test_pool_process import session, workers_of
from tests.support.videos import write_video

PATIENT = "from f2l_vllm.cli.main import main; main()"
PROGRAM = f"""
from f2l_vllm.catalog import jobs
from f2l_vllm.pool import pool
jobs.LEASE_SECONDS, pool._BEAT_SECONDS = 4.0, 0.5  # a pool is given up after seconds instead of a minute
{PATIENT}
"""


class Site:
    """A catalog, a store, and the uploads of a server that has no workers."""

    def __init__(self, folder: Path, model: Path, database: str | None = None) -> None:
        self.folder, self.model, self.far = folder, model, folder / "far"
        self.database = database or f"sqlite:///{folder / 'catalog.sqlite3'}"
        self.far_url = f"file://{self.far}"
        self.catalog = Catalog(self.database)
        self.store = open_store(folder / "server", url=self.far_url)
        self.workers = plan(str(model), {"F2L_HOME": str(folder / "server")})
        self.catalog.appoint(self.workers.revision)

    def upload(self, name: str, **video: int):
        path = write_video(self.folder / f"{name}.mp4", **video)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        at = self.catalog.reserve_video(sha256)
        temporary = self.store.temporary()
        shutil.copy(path, temporary)
        self.store.keep_video(temporary, at.video)
        upload = Upload("t", sha256, path.stat().st_size, path.name, "vision")
        return self.catalog.add_file(upload, f"f2l-{name}", queue_limit=9, video=at)

    def state(self, record) -> VideoState:
        return self.catalog.file(record.id, "t").state

    def log(self, name: str) -> Path:
        """What the workers of this name say."""
        return self.folder / f"{name}.log"

    def tidy(self) -> None:
        """Remove what was deleted or given up, as the servers' janitor does every few seconds."""
        for doomed in self.catalog.tombstones(100):
            (self.store.remove_video if doomed.is_video else self.store.remove_adapter)(doomed.object)
            self.catalog.bury([doomed])

    def published(self) -> set[str]:
        return {path.name for path in (self.far / "adapters").glob("*")}

    @contextmanager
    def run(self, name: str, *flags: str, program: str = PROGRAM):
        """Workers in a session of their own: the process."""
        home = self.folder / name
        flags = ("--database-url", self.database, "--store", self.far_url, *flags)
        words = ["workers", str(self.model), "--home", str(home), *flags, "--worker-cpus", "0.5"]
        with self.log(name).open("a") as log:
            command = [sys.executable, "-c", program, *words]
            process = subprocess.Popen(command, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            for pid in session(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory, hypernetwork_model):
    site = Site(tmp_path_factory.mktemp("site"), hypernetwork_model)
    yield site
    site.catalog.close()


def left(home: Path) -> list[Path]:
    return [path for kind in ("videos", "adapters", "tmp") for path in (home / kind).rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def url():
    """Where the first program says how it is."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def one(site, url):
    with site.run("one", "--port", url.rpartition(":")[2]) as process:
        yield process


@pytest.fixture(scope="module")
def two(site):
    with site.run("two") as process:
        yield process


def test_workers_say_how_they_are_and_keep_nothing(site, one, url):
    first = site.upload("first")
    until(lambda: site.state(first) is VideoState.PROCESSED)
    assert [httpx.get(url + path).status_code for path in ("/health", "/ready", "/other")] == [200, 200, 404]
    assert 'f2l_internalized_total{outcome="published"} 1.0' in httpx.get(f"{url}/metrics").text
    assert left(site.folder / "one") == []
    site.catalog.appoint("another revision")
    until(lambda: httpx.get(f"{url}/ready").status_code == 503)
    assert "make nothing" in httpx.get(f"{url}/ready").text
    site.catalog.appoint(site.workers.revision)
    until(lambda: httpx.get(f"{url}/ready").status_code == 200)


def test_a_machine_that_stood_still_changes_nothing_when_it_goes_on(site, one, request):
    (worker,) = workers_of(one.pid)
    (decoder,) = decoders(worker)
    os.kill(decoder, signal.SIGSTOP)
    record = site.upload("second", frames=30)
    until(lambda: site.state(record) is VideoState.DECODING)
    frozen = session(one.pid)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    request.getfixturevalue("two")
    until(lambda: site.state(record) is VideoState.PROCESSED)
    (published,) = site.published() - {path for path in site.published() if path.startswith("f2l-first")}
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    until(lambda: len(workers_of(one.pid)) == 1 and left(site.folder / "one") == [])
    again = site.upload("third", frames=40)
    until(lambda: site.state(again) is VideoState.PROCESSED)
    site.tidy()
    assert {name for name in site.published() if name.startswith("f2l-second")} == {published}
    assert site.catalog.adapter("f2l-second").object == published


def test_workers_told_to_stop_finish_the_video_in_work_and_told_twice_let_it_go(site, one, two, url):
    """The last use of both."""
    done = 0
    while len(decoders(*workers_of(one.pid), *workers_of(two.pid))) < 2:  # one is started with a first video
        for record in [site.upload(f"more-{done}-{number}", frames=50 + 2 * done + number) for number in range(2)]:
            until(lambda record=record: site.state(record) is VideoState.PROCESSED)
        done += 1
    with hanging_decoders(*workers_of(one.pid), *workers_of(two.pid)):
        in_work = [site.upload(f"in-work-{number}", frames=20 + number) for number in range(2)]
        until(lambda: {site.state(record) for record in in_work} == {VideoState.DECODING})
        waiting = site.upload("waiting", frames=40)
        os.killpg(one.pid, signal.SIGINT)  # as a terminal's Ctrl-C, to Ray as well
        two.send_signal(signal.SIGTERM)
        until(lambda: all("told to stop" in site.log(name).read_text() for name in ("one", "two")))
        two.send_signal(signal.SIGTERM)
        assert two.wait(60) == 0
        assert one.poll() is None
        assert httpx.get(f"{url}/health").status_code == 200
    assert one.wait(60) == 0
    said = site.log("one").read_text().splitlines()
    assert ["told to stop" in said[-2], said[-1].endswith("stopped")] == [True, True]
    finished, let_go = sorted(in_work, key=lambda record: site.state(record) is VideoState.UPLOADED)
    assert site.state(finished) is VideoState.PROCESSED
    assert [site.state(record) for record in (let_go, waiting)] == [VideoState.UPLOADED] * 2
    assert {job.attempts for job in site.catalog.claim_jobs(9)} == {1}  # to let it go was not the video's fault
    until(lambda: not session(one.pid))
    assert left(site.folder / "one") == left(site.folder / "two") == []
