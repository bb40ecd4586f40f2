"""The server's side of the pool: starts the pool process, reads its messages, and starts another if it ends."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from f2l_vllm.lifeline import end_session
from f2l_vllm.pool.messages import WorkerSpec

logger = logging.getLogger(__name__)

_RESTART_SECONDS = 5.0
_STOP_SECONDS = 2.5  # short, because the server has promised to end soon
STARTING = "the pool is starting"
BEGIN = "begin"  # and a revision: tells a pool that it may claim jobs
_EARLY = "_F2L_POOL"  # environment variable: describes the process that was started before the server


def start_early(spec: WorkerSpec) -> dict[str, str]:
    """Start the pool before this process becomes the server, so that workers load while the engine does.

    Returns:
        Environment variables for the server. The server's `PoolProcess` takes the process over if its `spec` is the
        same. A process that nobody takes over ends with the server.
    """
    if not hasattr(os, "pidfd_open"):
        return {}
    process = _launch(_written(spec))
    assert process.stdin is not None
    assert process.stdout is not None
    ends = [os.dup(end.fileno()) for end in (process.stdin, process.stdout)]  # `process` closes its own descriptors
    for end in ends:
        os.set_inheritable(end, True)
    return {_EARLY: json.dumps([_written(spec), os.getpid(), process.pid, *ends])}


class PoolProcess:
    """Keeps `python -m f2l_vllm.pool` running. It inherits its settings from this process's environment.

    Args:
        spec: what each worker loads.
        revision: identifies models and sampling. The pool makes adapters while files are answered with this revision.
        on_outcome: called from a thread when a job ends, with `published` or `failed` and the seconds by stage.
    """

    def __init__(self, spec: WorkerSpec, revision: str, on_outcome: Callable[[str, dict[str, float]], None]) -> None:
        self._spec, self._revision = _written(spec), revision
        self._on_outcome = on_outcome
        self._stopping = threading.Event()
        self._last = ""
        self._process: subprocess.Popen[str] | _Inherited | None = None
        self._thread = threading.Thread(target=self._run, name="f2l-pool", daemon=True)
        self.workers = 0  # loaded and alive
        self.why = STARTING  # while there are no workers: what the pool waits for, or what went wrong

    def start(self) -> None:
        """Start the process and read its messages in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Close the process's standard input, which tells it to stop, and wait for it."""
        self._stopping.set()
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            process = self._process = _inherited(self._spec) or _launch(self._spec)
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError, ValueError):  # the process has ended, or was told to
                process.stdin.write(f"{BEGIN} {self._revision}\n")
                process.stdin.flush()
            for line in process.stdout:
                self._hear(line)
            code = process.wait()
            end_session(process.pid)  # Ray keeps running for a minute after its driver has died
            self.workers = 0
            self.why = "the pool's process ended and is started again" + (f"; {self._last}" if self._last else "")
            if not self._stopping.is_set():
                logger.warning("the pool process ended with %d and is started again", code)
                self._stopping.wait(_RESTART_SECONDS)

    def _hear(self, line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            logger.info("pool: %s", line.rstrip())  # printed by a library
            return
        if "workers" in message:
            logger.debug("%d hypernetwork workers are ready", message["workers"])  # the pool logs which ones
            self.workers = message["workers"]
        elif "why" in message:
            logger.info("no hypernetwork worker is ready: %s", message["why"])
            self.why = self._last = message["why"]
        else:
            self._on_outcome(message["outcome"], message["seconds"])


class _Inherited:
    """Stands in for `Popen`, for a process that was started before this one became the server."""

    def __init__(self, pid: int, stdin: int, stdout: int) -> None:
        self.pid = pid
        self.stdin = os.fdopen(stdin, "w")
        self.stdout = os.fdopen(stdout)
        self._ended = os.pidfd_open(pid)
        self._lock = threading.Lock()
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self._ended], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("the pool", timeout or 0.0)
        with self._lock:
            if self._code is None:
                self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self._code

    def kill(self) -> None:
        with self._lock:
            if self._code is None:
                os.kill(self.pid, signal.SIGKILL)


def _written(spec: WorkerSpec) -> str:
    return json.dumps(asdict(spec), default=str)


def _launch(spec: str) -> subprocess.Popen[str]:
    # The pool gets its own session, so that a terminal's Ctrl-C reaches only the server, which ends the pool in order.
    return subprocess.Popen(
        [sys.executable, "-m", "f2l_vllm.pool", spec],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _inherited(spec: str) -> _Inherited | None:
    """The process that was started early; None on later calls, and in another process than the one that it was started
    for. A process with another `spec` is ended."""
    written = os.environ.pop(_EARLY, None)
    if written is None:
        return None
    its, starter, pid, stdin, stdout = json.loads(written)
    if starter != os.getpid():
        return None
    for end in (stdin, stdout):
        os.set_inheritable(end, False)
    process = _Inherited(pid, stdin, stdout)
    if its == spec:
        return process
    logger.info("the pool is started again, for what the engine takes")
    process.stdin.close()
    process.wait()
    end_session(process.pid)
    return None
