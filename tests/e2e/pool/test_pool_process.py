"""The pool as a process of its own: its workers and it are replaced when they die."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import ray
from pydantic import TypeAdapter

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.pool.actors import Actors
from f2l_vllm.pool.config import PoolConfig
from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.pool.pool import Pool
from f2l_vllm.pool.supervisor import PoolProcess
from f2l_vllm.store.store import Store
from tests.e2e.pool.test_pool import Bench, hanging_decoders, until
from tests.support.videos import write_video


def session(pid):
    """Every living process of a session."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == pid and fields[0] != "Z":
                found.add(int(entry.name))
    return found


def command_line(pid):
    """Of a process; empty if it has ended."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def workers_of(pool):
    """The actors in a pool's session."""
    return [pid for pid in session(pool) if command_line(pid).startswith("ray::Hyper")]


def programs_of(pool):
    """The scripts that run in a pool's session; of Ray's daemons, those that are written in Python."""
    words = [command_line(pid).split("\0") for pid in session(pool)]
    return {Path(word).name for command in words for word in command if word.endswith(".py")}


class Served:
    """A pool as a server has it, whose jobs have one attempt of some seconds; a bench for its catalog and store."""

    def __init__(self, home, model):
        self.bench = Bench(home, model)  # its own pool is never started
        self.bench.catalog.appoint("r")
        self.outcomes = []
        self.pool = PoolProcess(self.bench.spec, "r", lambda *outcome: self.outcomes.append(outcome))
        self.pool.start()

    @property
    def pid(self):
        return self.pool._process.pid

    def make(self, clip, name):
        """An adapter; the worker then has a decoder."""
        self.bench.wait(self.bench.add(clip, name=name), VideoState.PROCESSED)

    def failed(self, record):
        """Why a video has ended as an error; its file is removed."""
        found = self.bench.wait(record, VideoState.ERROR)
        self.bench.catalog.remove_file(record.id, "t")
        assert found.error_code == "internalization_failed"
        return found.error_message


@pytest.fixture(scope="module")
def served(tmp_path_factory, hypernetwork_model):
    home = tmp_path_factory.mktemp("served") / "home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("f2l_vllm.pool.supervisor._RESTART_SECONDS", 0.2)
        for name, value in {"F2L_HOME": home, "F2L_JOB_ATTEMPTS": 1, "F2L_JOB_SECONDS": 10}.items():
            patch.setenv(name, str(value))
        served = Served(home, hypernetwork_model)
        yield served
        served.pool.stop()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4")


def test_a_video_that_keeps_costing_workers_ends_as_an_error(served, clip):
    """One attempt and no more, also when the same bytes come again; other videos become ready."""
    served.make(clip, "f2l-first")
    with hanging_decoders(*workers_of(served.pid)):
        assert "1 attempts" in served.failed(served.bench.add(clip, name="f2l-poison"))
    served.make(clip, "f2l-second")
    (worker,) = workers_of(served.pid)
    with hanging_decoders(worker):
        again = served.bench.add(clip, name="f2l-poison")
        served.bench.wait(again, VideoState.DECODING)
        os.kill(worker, signal.SIGKILL)
        assert "1 attempts" in served.failed(again)
    served.make(clip, "f2l-third")
    assert served.bench.catalog.counts()[1:] == (0, 0)


def test_a_killed_pool_is_replaced_and_a_stopped_one_leaves_nothing(served, clip):
    """The module's last use of it."""
    first = served.pid
    served.make(clip, "f2l-before")
    assert not {"monitor.py", "log_monitor.py", "dashboard.py"} & programs_of(first)
    served.outcomes.clear()
    with hanging_decoders(*workers_of(first)):
        poison = served.bench.add(clip, name="f2l-poison")
        served.bench.wait(poison, VideoState.DECODING)
        os.kill(first, signal.SIGKILL)  # as a video would that takes the whole machine's memory
    served.failed(poison)  # not tried again by the next pool: it has cost all its attempts
    assert not session(first)  # Ray and the workers of the first
    served.make(clip, "f2l-after")
    second = served.pid
    assert second != first
    until(lambda: len(served.outcomes) == 2)
    assert [outcome for outcome, _ in served.outcomes] == ["failed", "published"]
    assert served.outcomes[1][1]["decode"] > 0
    served.pool.stop()
    until(lambda: not session(first) and not session(second))


def test_the_server_hears_why_no_worker_is_ready(tmp_path):
    folder = tmp_path / "any"
    spec = WorkerSpec(model=folder, hypernetwork=folder, home=folder, base_name="base", max_rank=64, threads=1)
    pool = PoolProcess(spec, "r", lambda *_: None)
    assert pool.why == "the pool is starting"
    pool._hear('{"why": "a worker needs 0.3 GPU"}\n')
    assert pool.why == "a worker needs 0.3 GPU"
    pool._hear('{"workers": 1}\n')
    assert pool.workers == 1


def test_a_pool_that_cannot_use_ray_says_why_in_a_line_and_ends(tmp_path):
    spec = WorkerSpec(model=tmp_path, hypernetwork=tmp_path, home=tmp_path, base_name="base", max_rank=64, threads=1)
    command = [sys.executable, "-m", "f2l_vllm.pool", TypeAdapter(WorkerSpec).dump_json(spec).decode()]
    environment = {**os.environ, "F2L_HOME": str(tmp_path), "F2L_RAY_ADDRESS": "nothing-here"}
    with subprocess.Popen(command, env=environment, text=True, stdin=PIPE, stdout=PIPE, stderr=PIPE) as ended:
        said = json.loads(ended.stdout.readline())
        assert said["why"].startswith("Ray cannot be used: Invalid address format")
        assert ended.wait(60) == 1
        assert "Traceback" not in ended.stderr.read()


def test_a_worker_that_no_node_has_room_for_is_waited_for_and_said(tmp_path, monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    folder = tmp_path / "any"
    spec = WorkerSpec(model=folder, hypernetwork=folder, home=folder, base_name="base", max_rank=64, threads=1)
    config = PoolConfig(1, cpus=1, gpus=0.3, ray_address="auto", job_attempts=3, job_seconds=60)
    actors = Actors(config, spec)
    pool = Pool(config, actors, None, Store(tmp_path))
    missing = actors.missing()
    assert missing == (
        "a worker needs 1 CPU and 0.3 GPU, and no node of the Ray cluster has as much (the most: 2 CPU and 0 GPU)"
    )
    (lane,) = pool._lanes
    looks = iter([([], ["info"]), ([], ["info"]), (["info"], [])])
    monkeypatch.setattr(ray, "wait", lambda *_args, **_values: next(looks))
    monkeypatch.setattr(ray, "get", lambda _info: "loaded")
    assert lane._loaded("info") == "loaded"
    assert pool.why() == missing  # as it was said while the worker waited
    nodes[1]["Alive"] = True
    assert actors.missing() is None
