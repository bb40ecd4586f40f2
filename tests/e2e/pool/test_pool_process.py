"""The pool as a process of its own: it is replaced when it dies, and it dies with its server."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import ray

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.pool.actors import Actors
from f2l_vllm.pool.config import PoolConfig
from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.pool.pool import Pool
from f2l_vllm.pool.supervisor import PoolProcess
from f2l_vllm.store.store import Store
from tests.e2e.pool.test_pool import WAIT_SECONDS, Bench, hanging_decoders, until
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


def workers_of(pool):
    """The actors in a pool's session."""
    return [pid for pid in session(pool) if (Path("/proc") / str(pid) / "cmdline").read_text().startswith("ray::Hyper")]


def programs_of(pool):
    """The scripts that run in a pool's session; of Ray's daemons, those that are written in Python."""
    words = [(Path("/proc") / str(pid) / "cmdline").read_text().split("\0") for pid in session(pool)]
    return {Path(word).name for command in words for word in command if word.endswith(".py")}


def test_a_killed_pool_is_replaced_and_a_stopped_one_leaves_nothing(tmp_path, hypernetwork_model, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("F2L_HOME", str(home))
    monkeypatch.setenv("F2L_JOB_ATTEMPTS", "1")
    bench = Bench(home, hypernetwork_model)  # for its catalog and store; its own pool is never started
    bench.catalog.appoint("r")
    outcomes = []
    pool = PoolProcess(bench.spec, "r", lambda outcome, seconds: outcomes.append((outcome, seconds)))
    pool.start()
    try:
        until(lambda: pool.workers == 1)
        first = pool._process.pid
        assert not {"monitor.py", "log_monitor.py", "dashboard.py"} & programs_of(first)
        clip = write_video(tmp_path / "a.mp4")
        bench.wait(bench.add(clip, name="f2l-first"), VideoState.PROCESSED)
        with hanging_decoders(*workers_of(first)):
            poison = bench.add(clip, name="f2l-poison")
            bench.wait(poison, VideoState.DECODING)
            os.kill(first, signal.SIGKILL)  # as a video would that takes the whole machine's memory
        # Not tried again by the next pool: it has cost all its attempts.
        assert bench.wait(poison, VideoState.ERROR).error_code == "internalization_failed"
        assert not session(first)  # Ray and the workers of the first
        record = bench.add(clip)
        bench.wait(record, VideoState.PROCESSED)
        second = pool._process.pid
        assert second != first
        until(lambda: len(outcomes) == 3)
        assert [outcome for outcome, _ in outcomes] == ["published", "failed", "published"]
        assert outcomes[2][1]["decode"] > 0
    finally:
        pool.stop()
    until(lambda: not session(first) and not session(second))


def test_a_pool_whose_server_is_gone_stops(tmp_path, hypernetwork_model):
    home = tmp_path / "home"
    home.mkdir()
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from f2l_vllm.pool.messages import WorkerSpec\n"
        "from f2l_vllm.pool.supervisor import PoolProcess\n"
        f"home, model = Path({str(home)!r}), Path({str(hypernetwork_model)!r})\n"
        "spec = WorkerSpec(\n"
        "    model=model, hypernetwork=model / 'hypernetwork', home=home, base_name='base', max_rank=64, threads=1\n"
        ")\n"
        "pool = PoolProcess(spec, 'r', lambda *_: None)\n"
        "pool.start()\n"
        f"end = time.monotonic() + {WAIT_SECONDS}\n"
        "while not pool.workers and time.monotonic() < end:\n"
        "    time.sleep(0.05)\n"
        "sys.stdout.write(str(pool._process.pid if pool.workers else 0) + '\\n')\n"
        "sys.stdout.flush()\n"
        "if pool.workers:\n"
        "    time.sleep(600)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "F2L_HOME": str(home)},
    )
    pool_pid = int(server.stdout.readline())
    assert pool_pid, "no worker was ready in time"
    assert len(session(pool_pid)) > 2  # Ray and the worker
    server.kill()
    server.wait()
    until(lambda: not session(pool_pid))


def test_the_server_hears_why_no_worker_is_ready(tmp_path):
    folder = tmp_path / "any"
    spec = WorkerSpec(model=folder, hypernetwork=folder, home=folder, base_name="base", max_rank=64, threads=1)
    pool = PoolProcess(spec, "r", lambda *_: None)
    assert pool.why == "the pool is starting"
    pool._hear('{"why": "a worker needs 0.3 GPU"}\n')
    assert pool.why == "a worker needs 0.3 GPU"
    pool._hear('{"workers": 1}\n')
    assert pool.workers == 1


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
