"""A pool that is started before its server: taken over by it, replaced where it is another one, ended with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

# Stands for the pool: says who it is, and at its first word that it has a worker.
POOL = """
import json, os, sys
print(json.dumps({"why": str(os.getpid())}), flush=True)
if sys.stdin.readline().strip() == "begin r":
    print(json.dumps({"workers": 1}), flush=True)
sys.stdin.read()
"""
COMMON = f"""
import os, subprocess, sys, time
from pathlib import Path
from f2l_vllm.pool import supervisor
from f2l_vllm.pool.messages import WorkerSpec
def launch(spec):
    return subprocess.Popen([sys.executable, "-c", {POOL!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
supervisor._launch = launch
folder = Path("any")
def spec(rank):
    return WorkerSpec(model=folder, hypernetwork=folder, home=folder, base_name="base", max_rank=rank, threads=1)
"""
SERVER = """
pool = supervisor.PoolProcess(spec(64), "r", lambda *_: None)
pool.start()
end = time.monotonic() + 60
while not pool.workers and time.monotonic() < end:
    time.sleep(0.01)
others = [name for name in os.environ if name.startswith("_F2L")]
print(pool._process.pid, pool.why, others, flush=True)
sys.stdin.read()
pool.stop()
print(pool._process.wait())
"""


def serve(rank: int, server: str = SERVER) -> tuple[int, subprocess.Popen]:
    """A program that starts a pool for adapters of this rank and becomes a server of 64; the pool's pid."""
    before = f"""
os.environ.update(supervisor.start_early(spec({rank})))
print(os.environ["_F2L_POOL"].split(", ")[-3], flush=True)
os.execv(sys.executable, [sys.executable, "-c", {COMMON + server!r}])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMON + before], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return int(process.stdout.readline()), process


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


def test_a_pool_started_early_is_the_servers_and_ends_with_it():
    early, process = serve(64)
    assert process.stdout.readline() == f"{early} {early} []\n"
    process.stdin.close()
    assert process.stdout.readline() == "0\n"
    assert process.wait() == 0
    assert is_gone(early)


def test_a_pool_of_other_workers_is_replaced():
    early, process = serve(32)
    pid, why, others = process.stdout.readline().split()
    assert pid == why != str(early)
    assert others == "[]"
    assert not Path(f"/proc/{early}").exists()
    process.communicate()
    assert is_gone(int(pid))


def test_a_pool_is_taken_over_by_nobody_but_the_server_it_was_started_for():
    between = f"sys.exit(subprocess.run([sys.executable, '-c', {COMMON + SERVER!r}]).returncode)"
    early, process = serve(64, server=between)
    pid, why, others = process.stdout.readline().split()
    assert pid == why != str(early)
    assert others == "[]"
    process.communicate()
    assert is_gone(early)


def test_a_pool_whose_server_never_comes_up_ends():
    early, process = serve(64, server="sys.exit(2)")
    assert process.wait() == 2
    assert is_gone(early)


def test_nothing_is_left_behind_by_a_server_that_was_killed():
    early, process = serve(64)
    process.stdout.readline()
    os.kill(process.pid, 9)
    process.wait()
    assert is_gone(early)
