"""Real Ray Serve over fake engines, which are killed, or hang, while questions are asked."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import promql
from tests.support.serve import Service, last_event, parent_of, process_at, running, until

_ENGINES = 3


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("cluster"), _ENGINES, fronts=1) as service:
        yield service


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
