"""Processes that do not outlive the one that started them, whatever they are doing. Linux only; elsewhere no promise.

The kernel ends them: a thread that watches needs Python's lock, which a long computation in C may hold. And it goes by
the process: Linux's parent-death signal comes with the end of the thread that started a process.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

_F_SETSIG = 10  # <linux/fcntl.h>


def end_with_writer(descriptor: int) -> None:
    """Be killed when nobody has the other end of this pipe any more: when the process has ended that holds it.

    Nothing may be written to it from here on.
    """
    if sys.platform != "linux":
        return
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    if select.select([descriptor], [], [], 0)[0]:  # it was closed before the kernel was told
        os._exit(1)


def end_with_spawner() -> None:
    """In a process of `multiprocessing`, be killed when the process ends that started it; nothing in any other."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with_writer(parent.sentinel)  # a pipe


def end_session(leader: int) -> None:
    """Kill what is left of the session that this process began, which has ended."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            session = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3])
            if session == leader:
                os.kill(int(entry.name), signal.SIGKILL)
