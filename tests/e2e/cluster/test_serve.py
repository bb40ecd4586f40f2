"""Real Ray Serve over fake engines, which are killed, or hang, while questions are asked."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from f2l_vllm.cluster import local
from f2l_vllm.server_process import LOOPBACK, free_port
from tests.support import ROOT, promql

_ENGINES = 3
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

    def __init__(self, home: Path, url: str) -> None:
        self._home = home
        self.client = httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
        self.outcomes: Counter[str] = Counter()
        self.engines: dict[str, str] = {}  # that the front knows of, name -> URL

    def command(self, *words: str, check: bool = True) -> str:
        """What `f2l-vllm cluster` says."""
        command = [sys.executable, "-m", "f2l_vllm.cli", "cluster", *words, "--home", str(self._home)]
        ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert not check or ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep `engines` up to date."""
        node = local.Node.find(self._home)
        assert node is not None
        environment = {**os.environ, **local.environment(self._home, LOOPBACK), "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", _WATCH, node.address]
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
            threading.Thread(target=self._read, args=(process.stdout,)).start()
            try:
                until(lambda: len(self.engines) == _ENGINES, 60)
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


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, port = tmp_path_factory.mktemp("cluster"), free_port()
    wanted = local.config("fake", [], engines=_ENGINES, fronts=1, workers=0, host=LOOPBACK, port=port)
    wanted["applications"][0]["args"]["command"] = f"{shlex.quote(sys.executable)} -m tests.support.fake_engine"
    (folder / "config.yaml").write_text(yaml.safe_dump(wanted))
    service = Service(folder / "home", f"http://{LOOPBACK}:{port}")
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


def test_a_video_has_one_engine_and_the_operator_sees_what_runs(service):
    homes = {video: service.engine_of(video) for video in (f"file-{number}" for number in range(12))}
    assert {video: service.engine_of(video) for video in homes} == homes
    assert len(set(homes.values())) > 1
    size = 3 << 20
    assert service.client.post("/v1/files", content=b"x" * size).json()["bytes"] == size
    question = {"model": "file-0", "messages": [], "stream": True, "max_tokens": 1000, "ms": 100}
    with service.client.stream("POST", "/v1/chat/completions", json=question) as answer:
        pieces = answer.iter_raw()
        assert next(pieces)
        said = service.command("status")
    assert f"Engine: {_ENGINES} running" in said
    assert "Front: 1 running" in said
    assert sorted(re.findall(r"http://127\.0\.0\.1:\d+ +│ +(\d)", said)) == ["0", "0", "1"]
    assert "runs: f2l-vllm cluster down stops it" in service.command("up", check=False)


def test_ray_counts_what_the_alert_on_engines_asks_for(service):
    (asked,) = promql.series(next(one["expr"] for one in promql.alerts() if one["expr"].startswith("ray_")))
    addresses = re.findall(r"http://[\d.:]+/metrics", service.command("status"))
    found: list[dict[str, str]] = []

    def is_shown() -> bool:
        for address in addresses:
            families = text_string_to_metric_families(httpx.get(address, timeout=10).text)
            found.extend(one.labels for family in families for one in family.samples if one.name == asked.name)
        return bool(found)

    until(is_shown, 60)
    assert {one["deployment"] for one in found} == {"Engine", "Front"}
    assert asked.labels <= {*found[0]}


@pytest.mark.parametrize(
    ("what", "number"), [("server", signal.SIGKILL), ("replica", signal.SIGKILL), ("server", signal.SIGSTOP)]
)
def test_no_question_fails_while_an_engine_is_lost(service, what, number):
    service.outcomes.clear()
    stopped = threading.Event()
    with ThreadPoolExecutor(32) as pool:

        def load() -> None:
            count = 0
            while not stopped.wait(0.15):
                count += 1
                pool.submit(service.ask, count)

        loading = threading.Thread(target=load)
        loading.start()
        try:
            time.sleep(1)
            name, url = sorted(service.engines.items())[0]
            process = process_at(url.rpartition(":")[2])
            begun = threading.Event()
            cut = pool.submit(cut_off, service, int(url.rpartition(":")[2]), begun)
            assert begun.wait(20)
            os.kill(process if what == "server" else parent_of(process), number)
            known = until(lambda: service.engines.get(name) != url, 60)
            time.sleep(2)
        finally:
            stopped.set()
            loading.join()
    print(f"{what} {number.name}: known after {known:.1f} s, {dict(service.outcomes)}, a stream at it: {cut.result()}")
    assert service.outcomes.pop("whole") > 10
    assert set(service.outcomes) <= {"200 engine_lost"}  # it had begun
    assert cut.result() == "engine_lost"


def cut_off(service: Service, port: int, begun: threading.Event) -> str:
    """How a stream of a minute at this engine ends. Tells when it has begun."""
    video = next(name for name in (f"file-cut-{number}" for number in range(1000)) if service.engine_of(name) == port)
    question = {"model": video, "messages": [], "stream": True, "max_tokens": 200, "ms": 300}
    with service.client.stream("POST", "/v1/chat/completions", json=question) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        begun.set()
        return last_event(text + "".join(pieces))
