"""Starts and stops our server in a process of its own, for commands and measurements that need one."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

START_SECONDS = 600.0
STOP_SECONDS = 60.0
LOOPBACK = "127.0.0.1"
_RAYS_LAST_PORT = 19_999  # of the workers' ports, by `ray start --max-worker-port`
_PORT_TRIES = 100
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ServerFailed(RuntimeError):
    """The server did not become ready; the message holds the end of its log."""


class ServerProcess:
    """`f2l-vllm serve MODEL …` on a free port of this machine.

    Args:
        model: what `f2l-vllm serve` takes.
        home: data folder.
        flags: more flags for `f2l-vllm serve`.
        host: the address to listen at, by which others reach it.
        port: None for a free one.
        env: environment variables to add.
    """

    ready_path = "/ready"

    def __init__(
        self,
        model: str,
        home: Path,
        *flags: str,
        host: str = LOOPBACK,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        port = port or free_port(host)
        self.url = url_of(host, port)
        self.home = home
        self.log = home.parent / f"server-{port}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*self.command(model), *(() if host == LOOPBACK else ("--host", host)), "--port", str(port), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
            )

    def command(self, model: str) -> list[str]:
        """The command that starts the server, without the port and the flags."""
        return [sys.executable, "-m", "f2l_vllm.cli", "serve", model, "--home", str(self.home)]

    def wait_ready(self) -> None:
        """Return when the server answers 200 under `ready_path`.

        Raises:
            ServerFailed: the process ended, or `START_SECONDS` have passed.
        """
        import httpx  # the command line imports this module, and most commands need no client

        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}{self.ready_path}", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        code = self.process.poll()
        tail = self.log.read_text(errors="replace")[-4000:]
        raise ServerFailed(f"the server did not become ready (exit code {code}); the end of its log:\n{tail}")

    def descendants(self) -> dict[int, str]:
        """Every process the server has started: pid -> command line, by the parent links in /proc."""
        parents: dict[int, int] = {}
        commands: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text()
                    commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
        found = {self.process.pid}
        while grown := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= grown
        return {pid: commands[pid] for pid in found - {self.process.pid}}

    def stop(self) -> int:
        """Send what Ctrl-C sends and return the exit code.

        Raises:
            subprocess.TimeoutExpired: the server did not stop within `STOP_SECONDS`, and was killed.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def end(self) -> None:
        """Stop the server; if it does not stop in time, kill it and every process that it started."""
        started = self.descendants()
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            for process in started:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def _stop_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent is killed: nobody else would stop the server then."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def url_of(host: str, port: int) -> str:
    """Of a server at this name or address; RFC 3986 puts IPv6 addresses in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def free_port(host: str = LOOPBACK) -> int:
    """A port of this address that nobody listens at.

    It is below those that the system gives to outgoing connections, any of which could take it before it is used, and
    above those that Ray gives to its workers.
    """
    for port in random.SystemRandom().sample(range(_RAYS_LAST_PORT + 1, _first_given_port()), _PORT_TRIES):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
    raise OSError(f"no port of {host} is free")


def _first_given_port() -> int:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(given.read_text().split()[0]) if given.exists() else 0
    return first if first > _RAYS_LAST_PORT + _PORT_TRIES else 1 << 15
