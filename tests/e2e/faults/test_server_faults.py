"""One server through what can happen to it: each of its processes killed, its disk full, its store read-only.

Nothing is lost, nothing is left half there, and the next request answers.
"""

import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

pytest.register_assert_rewrite("faults.life", "faults.stages")

from tests.support.life import PATIENT, Life  # noqa: E402
from tests.support.stages import Processes, alive, send, until  # noqa: E402


@pytest.fixture(scope="module")
def life(hypernetwork_model, tmp_path_factory):
    """A data folder with a running server on it before each test."""
    life = Life(hypernetwork_model, tmp_path_factory.mktemp("faults"))
    yield life
    life.end()


def refused(life, clip):
    """The status and code with which an upload is refused, in words."""
    with pytest.raises(openai.APIStatusError) as error:
        life.upload(clip)
    assert int(error.value.response.headers["Retry-After"]) > 0
    assert len(error.value.message) > 40
    return error.value.status_code, error.value.code


def test_a_full_disk_refuses_uploads_and_the_next_one_works(life):
    clip = life.clips[2]
    with life.full_disk():
        assert refused(life, clip) == (507, "store_unavailable")
        assert life.ask(life.kept) == life.answers[life.clips[0]]
    life.check_disk(1)
    life.check({life.upload(clip): clip})


def test_jobs_that_meet_a_full_disk_wait_and_cost_no_worker(life):
    with life.at_every_stage() as (processes, files), life.full_disk():
        said = life.logged("wait for the store")
        life.stages.release()
        until(lambda: life.logged("wait for the store") >= said + 3, "three workers that cannot write")
        assert life.ask(life.kept) == life.answers[life.clips[0]]
        stages = {file_id: life.stage(file_id) for file_id in files}
        assert "error" not in stages.values()
        # One that had written its last byte needs no more room.
        assert {file_id for file_id in files if stages[file_id] == "processed"} <= {list(files)[2]}
    life.check(files)
    assert Processes(life.server).workers == processes.workers


def test_a_read_only_store_answers_and_refuses_uploads(life):
    clip = life.clips[3]
    with life.disk.read_only():
        assert refused(life, clip) == (503, "store_unavailable")
        assert life.ask(life.kept) == life.answers[life.clips[0]]
        assert life.server.client.files.content(life.kept).read() == life.clips[0].read_bytes()
    life.check_disk(1)
    life.check({life.upload(clip): clip})


def test_workers_killed_at_every_stage_lose_nothing(life):
    with life.at_every_stage() as (processes, files):
        before = life.published
        answer = life.stream(life.kept)
        send(signal.SIGKILL, processes.workers)
    assert "".join(answer) == life.whole
    life.check(files)
    assert life.published == before + len(files)


def test_a_pool_killed_with_jobs_at_every_stage_loses_nothing(life):
    with life.at_every_stage() as (processes, files):
        before = life.published
        answer = life.stream(life.kept)
        send(signal.SIGKILL, processes.pool)
    assert "".join(answer) == life.whole
    life.check(files)
    assert life.published == before + len(files)


def test_an_engine_that_dies_ends_its_server_and_the_next_one_goes_on(life):
    with life.at_every_stage() as (processes, files), ThreadPoolExecutor() as threads:
        answer = life.stream(life.kept)
        waiting = [threads.submit(life.ask, file_id, timeout=300, extra_body=PATIENT) for file_id in files]
        send(signal.SIGKILL, processes.engine)
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(answer)
        for question in waiting:
            with pytest.raises(openai.InternalServerError) as error:
                question.result(300)
            assert error.value.code == "shutting_down"
        assert life.server.process.wait(120) != 0  # which tells a supervisor to start another
        until(lambda: not alive(processes.all), "everything has ended")
    life.start()
    assert life.ask(life.kept) == life.answers[life.clips[0]]
    life.check(files)
    assert life.published == len(files)


def test_a_server_killed_with_jobs_at_every_stage_loses_nothing(life):
    """The last to stop three workers: the next server has one."""
    with life.at_every_stage() as (processes, files):
        answer = life.stream(life.kept)
        send(signal.SIGKILL, processes.server)  # alone: its parts end with it, whatever they are at
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(answer)
        until(lambda: not alive(processes.all), "everything has ended")
    assert life.server.process.wait() == -signal.SIGKILL
    life.start(workers=1)
    assert life.ask(life.kept) == life.answers[life.clips[0]]
    life.check(files)
    assert life.published == len(files)
