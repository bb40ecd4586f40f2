"""A server that a command started does not outlive it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.server import Server
from tests.support.stages import Processes

SCRIPT = """
import sys, time
from pathlib import Path
from f2l_vllm.server_process import ServerProcess
print(ServerProcess("f2l-tiny", Path(sys.argv[1]) / "home").process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_a_server_stops_when_the_command_that_started_it_is_killed(tmp_path: Path) -> None:
    command = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    server = int(command.stdout.readline())
    os.kill(server, 0)
    command.send_signal(signal.SIGKILL)
    command.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(server, signal.SIGKILL)
    pytest.fail("the server goes on without the command")


def test_workers_load_while_the_engine_does(server: Server) -> None:
    def started(pid: int) -> int:
        """In clock ticks since the machine was started."""
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])

    processes = Processes(server)
    (engine,), (pool,), workers = processes.engine, processes.pool, processes.workers
    assert workers
    assert all(started(pid) < started(engine) for pid in (pool, *workers))
    assert "pool is started again" not in server.log.read_text()
