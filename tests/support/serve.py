"""Ray Serve with the configuration of `f2l-vllm cluster up`, over fake engines, as clients and its operator see it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx
import yaml

from f2l_vllm.cluster import local
from f2l_vllm.server_process import LOOPBACK, free_port
from tests.support import ROOT

_WATCH = """
import json, sys, time
from f2l_vllm.cluster import state
state.connect(sys.argv[1])
while True:
    print(json.dumps(state.engines()), flush=True)
    time.sleep(0.1)
"""


class Service:
    """The cluster as clients and its operator see it. Ray reads variables when it is imported: other processes do."""

    def __init__(self, home: Path, url: str, engines: int, environment: Mapping[str, str]) -> None:
        self._home, self._count, self._environment = home, engines, environment
        self.client = httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
        self.outcomes: Counter[str] = Counter()
        self.engines: dict[str, str] = {}  # that the front knows of, name -> URL

    def command(self, *words: str, check: bool = True) -> str:
        """What `f2l-vllm cluster` says."""
        command = [sys.executable, "-m", "f2l_vllm.cli", "cluster", *words, "--home", str(self._home)]
        ran = subprocess.run(
            command, env={**os.environ, **self._environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert not check or ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    @property
    def node(self) -> local.Node:
        """Ray's."""
        node = local.Node.find(self._home)
        assert node is not None
        return node

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep `engines` up to date."""
        environment = {**os.environ, **local.environment(self._home, LOOPBACK), "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", _WATCH, self.node.address]
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
            threading.Thread(target=self._read, args=(process.stdout,)).start()
            try:
                until(lambda: len(self.engines) == self._count, 60)
                yield
            finally:
                process.kill()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            self.engines = json.loads(line)

    def ask(self, number: int, **more: object) -> None:
        """One question, streamed; its outcome is counted."""
        question = {"model": f"file-{number % 30}", "messages": [], "stream": True, "max_tokens": 5, "ms": 20, **more}
        try:
            answer = self.client.post("/v1/chat/completions", json=question)
        except httpx.HTTPError as error:
            self.outcomes[f"broken {type(error).__name__}"] += 1
            return
        end = last_event(answer.text)
        whole = answer.status_code == 200 and end == "[DONE]"
        self.outcomes["whole" if whole else f"{answer.status_code} {end}"] += 1

    def engine_of(self, video: str) -> int:
        """The port of the engine that answers about it."""
        question = {"model": video, "messages": [], "max_tokens": 1}
        return int(self.client.post("/v1/chat/completions", json=question).json()["engine"])


@contextmanager
def running(folder: Path, engines: int, fronts: int, **environment: str) -> Iterator[Service]:
    """The service, without workers; in the end nothing of it may be left.

    Args:
        environment: variables for Ray and whoever talks to it.
    """
    port = free_port()
    wanted = local.config("fake", [], engines=engines, fronts=fronts, workers=0, host=LOOPBACK, port=port)
    wanted["applications"][0]["args"]["command"] = f"{shlex.quote(sys.executable)} -m tests.support.fake_engine"
    (folder / "config.yaml").write_text(yaml.safe_dump(wanted))
    service = Service(folder / "home", f"http://{LOOPBACK}:{port}", engines, environment)
    try:
        said = service.command("up", "--config", str(folder / "config.yaml"))
        assert f"ready: http://{LOOPBACK}:{port}/v1" in said
        with service.watched():
            yield service
    finally:
        service.command("down", check=False)
    assert local.Node.find(folder / "home") is None
    assert not [words for _, words in processes() if str(folder) in " ".join(words)]


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return time.monotonic() - began


def last_event(text: str) -> str:
    """`[DONE]`, or the code of the error that an answer ends with."""
    last = [event for event in text.split("\n\n") if event][-1].removeprefix("data: ")
    return last if last == "[DONE]" else str(json.loads(last)["error"]["code"])


def processes() -> Iterator[tuple[int, list[str]]]:
    """Every process, with its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            yield int(entry.name), (entry / "cmdline").read_text().split("\0")


def process_at(port: str) -> int:
    """The fake engine that listens there."""
    return next(pid for pid, words in processes() if "tests.support.fake_engine" in words and port in words)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
