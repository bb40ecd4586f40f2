"""Processes that do not outlive the process that started them, whatever they are doing. Only Linux guarantees this.

The kernel kills them, because a watching thread would need Python's lock, which a long computation in C may hold. The
kernel watches a pipe that the starting process holds, because Linux's parent-death signal is sent as soon as the
starting thread ends.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

_F_SETSIG = 10  # <linux/fcntl.h>


def end_with_writer(descriptor: int) -> None:
    """Have the kernel kill this process when the process that holds the other end of this pipe has ended.

    Nothing may be written to the pipe from here on.
    """
    if sys.platform != "linux":
        return
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    if select.select([descriptor], [], [], 0)[0]:  # the pipe was closed before the kernel watched it
        os._exit(1)


def end_with_spawner() -> None:
    """Have the kernel kill this `multiprocessing` child when its parent ends; does nothing in any other process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with_writer(parent.sentinel)  # a pipe


def end_with_server() -> None:
    """In a server's engine and its workers: end with the process that started them and not before it. Ctrl-C in a
    terminal and a supervisor's SIGTERM may reach all processes at once, while answers are still being written."""
    end_with_spawner()
    in_server = "f2l_files" in os.environ.get("VLLM_PLUGINS", "") and multiprocessing.parent_process() is not None
    if in_server and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)  # a forked process has its parent's, which would take these signals for its own
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # not SIG_IGN, which their children would inherit


def end_session(leader: int) -> None:
    """Kill what is left of the session of `leader`, a process that has ended."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended meanwhile
            session = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3])
            if session == leader:
                os.kill(int(entry.name), signal.SIGKILL)
