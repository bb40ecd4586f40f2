"""Real Ray Serve over fake engines, which are killed, or hang, while questions are asked."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from f2l_vllm.cluster import local
from f2l_vllm.cluster.names import ENGINE
from f2l_vllm.server_process import LOOPBACK, free_port
from tests.support import ROOT

_COMMAND = f"{shlex.quote(sys.executable)} -m tests.support.fake_engine"
_ENGINES = 3


class Service:
    """The cluster as its clients and its operator see it."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
        self.outcomes: Counter[str] = Counter()

    def ask(self, number: int, **more: object) -> None:
        """One question, streamed; its outcome is counted."""
        question = {"model": f"file-{number % 30}", "messages": [], "stream": True, "max_tokens": 5, "ms": 20, **more}
        try:
            answer = self.client.post("/v1/chat/completions", json=question)
        except httpx.HTTPError as error:
            self.outcomes[f"broken {type(error).__name__}"] += 1
            return
        last = [event for event in answer.text.split("\n\n") if event][-1].removeprefix("data: ")
        whole = answer.status_code == 200 and last == "[DONE]"
        said = "whole" if whole else f"{answer.status_code} {json.loads(last)['error']['code']}"
        self.outcomes[said] += 1

    def engine_of(self, video: str) -> int:
        """The port of the engine that answers about it."""
        question = {"model": video, "messages": [], "max_tokens": 1}
        return int(self.client.post("/v1/chat/completions", json=question).json()["engine"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from f2l_vllm.cluster import state

    home, port = tmp_path_factory.mktemp("cluster") / "home", free_port()
    wanted = local.config("fake", [], engines=_ENGINES, fronts=1, workers=0, host=LOOPBACK, port=port)
    wanted["applications"][0]["args"]["command"] = _COMMAND
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local.environment(home, LOOPBACK), "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        node = local.Node.start(home, {})
        try:
            local.deploy(wanted, node.address, {})
            state.connect(node.address)
            state.wait_running(120)
            until(lambda: len(state.engines()) == _ENGINES, 30)
            yield Service(f"http://{LOOPBACK}:{port}")
        finally:
            state.disconnect()
            node.stop(home)
    assert local.Node.find(home) is None


def until(condition, seconds: float) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return time.monotonic() - began


def process_at(port: str) -> int:
    """The fake engine that listens there."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "tests.support.fake_engine" in words and port in words:
            return int(entry.name)
    raise AssertionError(f"nobody listens at {port}")


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_video_has_one_engine_and_engines_say_what_they_have_to_do(service):
    from f2l_vllm.cluster import state

    homes = {video: service.engine_of(video) for video in (f"file-{number}" for number in range(12))}
    assert {video: service.engine_of(video) for video in homes} == homes
    assert len(set(homes.values())) > 1
    size = 3 << 20
    assert service.client.post("/v1/files", content=b"x" * size).json()["bytes"] == size
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(service.ask, 0, max_tokens=2, ms=1500)
        until(lambda: sum(one.running or 0 for one in state.state().engines.values()) == 1, 2)
        asked.result()
    found = state.state()
    assert found.replicas[ENGINE] == {"RUNNING": _ENGINES}


@pytest.mark.parametrize(
    ("what", "number", "seconds"),
    [("server", signal.SIGKILL, 5), ("replica", signal.SIGKILL, 3), ("server", signal.SIGSTOP, 12)],
)
def test_no_question_fails_while_an_engine_is_lost(service, what, number, seconds):
    from f2l_vllm.cluster import state

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
            name, url = sorted(state.engines().items())[0]
            process = process_at(url.rpartition(":")[2])
            cut = pool.submit(cut_off, service, int(url.rpartition(":")[2]))
            time.sleep(0.5)
            os.kill(process if what == "server" else parent_of(process), number)
            known = until(lambda: state.engines().get(name) != url, 2 * seconds)
            time.sleep(2)
        finally:
            stopped.set()
            loading.join()
    print(f"{what} {number.name}: known after {known:.1f} s, {dict(service.outcomes)}, a stream at it: {cut.result()}")
    assert known < seconds
    assert service.outcomes.pop("whole") > 10
    assert set(service.outcomes) <= {"200 engine_lost"}  # it had begun
    assert cut.result() == ("[DONE]" if what == "replica" else "engine_lost")


def cut_off(service: Service, port: int) -> str:
    """How a stream of 6 s at this engine ends."""
    video = next(name for name in (f"cut-{number}" for number in range(1000)) if service.engine_of(name) == port)
    question = {"model": video, "messages": [], "stream": True, "max_tokens": 20, "ms": 300}
    answer = service.client.post("/v1/chat/completions", json=question)
    last = [event for event in answer.text.split("\n\n") if event][-1].removeprefix("data: ")
    return last if last == "[DONE]" else str(json.loads(last)["error"]["code"])
