"""A real server's processes, and its workers stopped at chosen stages of their jobs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path

from f2l_vllm.store.manifest import MANIFEST_FILE
from tests.support.server import Server

WAIT_SECONDS = 180
SAID_SECONDS = 0.5  # by then everybody has heard what a process said before it was stopped


def until(condition: Callable[[], object], what: str, pause: float = 0.01) -> None:
    """Wait for it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_SECONDS} s"
        time.sleep(pause)


def alive(pids: Collection[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    running = set()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                running.add(pid)
    return running


def ends_within(seconds: float, pid: int) -> bool:
    """Whether it runs no more, then or before."""
    deadline = time.monotonic() + seconds
    while alive([pid]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive([pid])


def send(number: int, pids: Collection[int]) -> None:
    """A signal, to all of them that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Processes:
    """A server's processes by what they are for, at one moment."""

    def __init__(self, server: Server) -> None:
        self.server = {server.process.pid}
        self._others = server.descendants()
        self.engine = self._those("EngineCore")
        self.pool = self._those("-m f2l_vllm.pool")
        self.workers = {pid for pid in self._others if self._others[pid].startswith("ray::Hyper")}

    @property
    def all(self) -> set[int]:
        """Every one of them."""
        return {*self.server, *self._others}

    def _those(self, mark: str) -> set[int]:
        return {pid for pid, command in self._others.items() if mark in command}


class Stages:
    """Stops a server's workers in the middle of their jobs; `release` lets all of them go on.

    Args:
        server: with as many workers as jobs are to be stopped.
        home: its data folder.
        stage: the stage of a file, as the server shows it.
    """

    def __init__(self, server: Server, home: Path, stage: Callable[[str], str]) -> None:
        self._home, self._stage = home, stage
        self._free = Processes(server).workers
        self._stopped: set[int] = set()

    def stop_at(self, stage: str, upload: Callable[[], str], remove: Callable[[str], object]) -> str:
        """Stop a worker while its file is at `stage`; while it publishes, when half an adapter is written. The file.

        A worker may be too quick: then its file is removed, and uploaded again.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            file_id = self._see(stage, upload)
            busy = {pid for pid in self._free if _runs_a_job(pid)}
            send(signal.SIGSTOP, busy)
            self._stopped |= busy
            time.sleep(SAID_SECONDS)
            if len(busy) == 1 and self._stage(file_id) == stage and (stage != "publishing" or self._half_written()):
                self._free -= busy
                return file_id
            self.release(busy)
            until(partial(self._is, "processed", file_id), "processed")
            remove(file_id)
        raise AssertionError(f"no worker was stopped while it was {stage}")

    def _see(self, stage: str, upload: Callable[[], str]) -> str:
        """Upload a file, and return as soon as its job is there, or past it."""
        adapters = self._home / "adapters"
        before = set(os.listdir(adapters))
        file_id = upload()
        if stage == "publishing":  # which takes some milliseconds, too few to ask the server
            until(lambda: self._half_written() or set(os.listdir(adapters)) != before, stage, pause=0.0001)
        else:
            until(lambda: self._stage(file_id) in (stage, "processed"), stage)
        return file_id

    def release(self, pids: Collection[int] | None = None) -> None:
        """Let these go on, or all."""
        pids = set(self._stopped if pids is None else pids)
        send(signal.SIGCONT, pids)
        self._stopped -= pids

    def _is(self, stage: str, file_id: str) -> bool:
        return self._stage(file_id) == stage

    def _half_written(self) -> bool:
        """An adapter's folder is there, and its manifest, which is written last, is not."""
        folders = [path for path in (self._home / "tmp").glob("*/*") if path.is_dir()]
        return any(not (folder / MANIFEST_FILE).exists() for folder in folders)


def _runs_a_job(pid: int) -> bool:
    """Ray names its processes after what they run."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return "internalize" in Path(f"/proc/{pid}/cmdline").read_text()
    return False
