"""Processes end with those that started them, in the middle of a computation that lets no thread of Python run."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from f2l_vllm.lifeline import end_session
from tests.support.stages import alive, ends_within, send

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the promise is Linux's")

LONG = "print(os.getpid(), flush=True); pow(7, 10**9, 10**400000 - 1)"

SPAWNER = f"""
import multiprocessing, os, sys, time
from f2l_vllm.lifeline import end_with_spawner
def work(early):
    if early:  # the parent ends before the kernel is told
        parent = os.getppid()
        print(os.getpid(), flush=True)
        while os.getppid() == parent: time.sleep(0.01)
    end_with_spawner()
    {LONG}
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1] == "early",)).start()
    time.sleep(3600)
"""

WRITER = f"""
import os, subprocess, sys, threading, time
CHILD = '''
import os, sys, time
from f2l_vllm.lifeline import end_with_writer
if sys.argv[2] == "early":
    parent = os.getppid()
    print(os.getpid(), flush=True)
    while os.getppid() == parent: time.sleep(0.01)
end_with_writer(int(sys.argv[1]))
{LONG}
'''
def start():
    theirs, ours = os.pipe()
    subprocess.Popen([sys.executable, "-c", CHILD, str(theirs), sys.argv[1]], pass_fds=[theirs])
    os.close(theirs)
thread = threading.Thread(target=start)  # whose end is no reason
thread.start()
thread.join()
time.sleep(3600)
"""

DECODER = """
import json, os, subprocess, sys, time
from dataclasses import asdict
from f2l_vllm.video.decoder import DecodeLimits
CHILD = '''
import os, sys
import f2l_vllm.video.decoder_child as child
def answer(*_):
    print(os.getpid(), file=sys.stderr, flush=True)
    pow(7, 10**9, 10**400000 - 1)
child._Videos.answer = answer
child.main(sys.argv[1], int(sys.argv[2]))
'''
theirs, ours = os.pipe()
limits = json.dumps(asdict(DecodeLimits()))
command = [sys.executable, "-c", CHILD, limits, str(theirs)]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=1, pass_fds=[theirs])
child.stdin.write(b"{}\\n")
child.stdin.flush()
time.sleep(3600)
"""


@pytest.mark.parametrize(
    ("script", "when"),
    [(SPAWNER, "early"), (SPAWNER, "late"), (WRITER, "early"), (WRITER, "late"), (DECODER, "late")],
    ids=["spawned, early", "spawned", "by a pipe, early", "by a pipe", "a decoder"],
)
def test_a_process_in_a_long_computation_ends_with_its_parent(tmp_path, script, when):
    path = tmp_path / "parent.py"
    path.write_text(script)
    parent = subprocess.Popen([sys.executable, str(path), when], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        time.sleep(0.5)
        assert alive([child])
        parent.kill()
        parent.wait()
        assert ends_within(5, child)
    finally:
        parent.kill()
        send(signal.SIGKILL, [child])


SERVER = """
import asyncio, multiprocessing, os, signal, sys, time
from f2l_vllm.lifeline import end_with_server
def engine():
    end_with_server()
    print(os.getpid(), flush=True)
    time.sleep(3600)
async def serve():
    heard = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, heard.set)
    multiprocessing.get_context(sys.argv[1]).Process(target=engine).start()
    await heard.wait()
    print("heard", flush=True)
    await asyncio.sleep(3600)
if __name__ == "__main__":
    asyncio.run(serve())
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_engine_leaves_signals_to_its_server_and_ends_with_it(tmp_path, method):
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    environment = {**os.environ, "VLLM_PLUGINS": "f2l,f2l_files"}
    command = [sys.executable, str(path), method]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    engine = int(server.stdout.readline())
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(engine, number)
            time.sleep(0.2)
        assert alive([engine])
        assert not select.select([server.stdout], [], [], 0.5)[0]  # it heard nothing of the engine's
        os.kill(server.pid, signal.SIGTERM)
        assert server.stdout.readline() == "heard\n"
        server.kill()
        server.wait()
        assert ends_within(5, engine)
    finally:
        server.kill()
        server.wait()
        send(signal.SIGKILL, [engine])


def test_what_is_left_of_a_session_is_ended():
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    left = int(leader.stdout.readline())
    other = subprocess.Popen(["sleep", "600"])
    leader.kill()
    leader.wait()
    assert Path(f"/proc/{left}").exists()
    end_session(leader.pid)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{left}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{left}").exists()
    assert other.poll() is None
    other.kill()
    other.wait()
