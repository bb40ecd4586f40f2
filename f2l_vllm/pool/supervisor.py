"""The server's side of the pool: starts the pool process, hears from it, and starts another if it ends."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict

from f2l_vllm.pool.messages import WorkerSpec

logger = logging.getLogger(__name__)

_RESTART_SECONDS = 5.0
_STOP_SECONDS = 2.5  # its server has promised to be gone soon
STARTING = "the pool is starting"


class PoolProcess:
    """`python -m f2l_vllm.pool`, kept running. Its settings are this process's environment.

    Args:
        spec: what each worker loads.
        on_outcome: called from a thread with `published` or `failed` and seconds by stage when a job ends.
    """

    def __init__(self, spec: WorkerSpec, on_outcome: Callable[[str, dict[str, float]], None]) -> None:
        self._spec = json.dumps(asdict(spec), default=str)
        self._on_outcome = on_outcome
        self._stopping = threading.Event()
        self._last = ""
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, name="f2l-pool", daemon=True)
        self.workers = 0  # loaded and alive
        self.why = STARTING  # while there is none: what it waits for, or what went wrong

    def start(self) -> None:
        """Start the process and listen to it."""
        self._thread.start()

    def stop(self) -> None:
        """Close its standard input, which it takes as the sign to stop, and wait for it."""
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
            # A session of its own: a terminal's Ctrl-C reaches the server, which then ends the pool in order.
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "f2l_vllm.pool", self._spec],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                self._hear(line)
            code = process.wait()
            self.workers = 0
            self.why = "the pool's process ended and is started again" + (f"; {self._last}" if self._last else "")
            if not self._stopping.is_set():
                logger.warning("the pool process ended with %d and is started again", code)
                self._stopping.wait(_RESTART_SECONDS)

    def _hear(self, line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            logger.info("pool: %s", line.rstrip())  # a library that prints
            return
        if "workers" in message:
            logger.debug("%d hypernetwork workers are ready", message["workers"])  # the pool says who they are
            self.workers = message["workers"]
        elif "why" in message:
            logger.info("no hypernetwork worker is ready: %s", message["why"])
            self.why = self._last = message["why"]
        else:
            self._on_outcome(message["outcome"], message["seconds"])
