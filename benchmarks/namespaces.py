"""Machines on a network of their own: network namespaces on a bridge, whose links can be cut and made slow.

`alone` runs this command again where it has network, mounts and processes of its own, so that the kernel removes all
of them with it, however it ends. It needs root and `unshare`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress

_ALONE = "F2L_BENCHMARK_IS_ALONE"
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_FRAME_BYTES = 65536
_PR_SET_PDEATHSIG = 1


def alone() -> None:
    """Return at once if this process has a network of its own; else run the same command with one, and exit.

    Raises:
        SystemExit: with its exit code, or because nobody may do this here.
    """
    if os.environ.get(_ALONE) == str(os.getpid()):
        return
    if os.getuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        raise SystemExit("networks of its own: run this as root, with iproute2 and util-linux installed")
    # PID 1 of the new processes; with it end all others.
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable]
    environment = {**os.environ, _ALONE: "1"}
    done = subprocess.run([*command, *sys.orig_argv[1:]], env=environment, preexec_fn=_end_with_parent)
    raise SystemExit(done.returncode)


class Network:
    """A bridge; this process is at its address."""

    address = "192.0.2.1"

    def __init__(self) -> None:
        assert os.environ.get(_ALONE) == str(os.getpid()), "call `alone` first"
        os.makedirs("/run/netns", exist_ok=True)
        _run("mount -t tmpfs tmpfs /run/netns")
        for command in ("link set lo up", "link add f2l type bridge", "link set f2l up"):
            _run(f"ip {command}")
        _run(f"ip addr add {self.address}/24 dev f2l")
        self._count = 1

    def machine(self) -> Machine:
        """One more."""
        self._count += 1
        return Machine(f"f2l{self._count}", f"192.0.2.{self._count}")


class Machine:
    """`name` is its namespace's, `address` its own. Its link has been up since it was made."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._link = Link(f"{name}-in", f"{name}-out")
        inside = f"ip -n {name}"
        for command in (
            f"ip netns add {name}",
            f"ip link set {name}-in netns {name}",
            f"{inside} addr add {address}/24 dev {name}-in",
            f"{inside} link set {name}-in up",
            f"{inside} link set lo up",
            f"ip link set {name}-out master f2l",
            f"ip link set {name}-out up",
        ):
            _run(command)

    def cut(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self._link.is_up = False

    def mend(self) -> None:
        """After `cut`."""
        self._link.is_up = True

    def delay(self, seconds: float) -> None:
        """Let whatever this machine sends arrive so much later."""
        self._link.seconds = seconds


class Link:
    """Carries frames between two new interfaces, those of the first one `seconds` late. Not every kernel has netem."""

    def __init__(self, inside: str, outside: str) -> None:
        self.is_up, self.seconds = True, 0.0
        self._inside, self._outside = _tap(inside), _tap(outside)
        self._late: deque[tuple[float, bytes]] = deque()
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self) -> None:
        with selectors.DefaultSelector() as selector:
            for descriptor in (self._inside, self._outside):
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                wait = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
                for key, _ in selector.select(wait):
                    frame = os.read(key.fd, _FRAME_BYTES)
                    if self.is_up and key.fd == self._inside:
                        self._late.append((time.monotonic() + self.seconds, frame))
                    elif self.is_up:
                        _write(self._inside, frame)
                while self._late and self._late[0][0] <= time.monotonic():
                    _write(self._outside, self._late.popleft()[1])


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _tap(name: str) -> int:
    """A new interface, by what this process reads and writes of it."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return descriptor


def _write(descriptor: int, frame: bytes) -> None:
    with suppress(OSError):  # the interface is not up yet, or full: lost, as on any network
        os.write(descriptor, frame)


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)
