"""Ray Serve with HAProxy in front of its fronts, as Ray documents it, over fake engines; a part is killed meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from f2l_vllm.server_process import free_port
from tests.support.serve import Service, last_event, parent_of, process_at, processes, running, until

_ENGINES, _FRONTS, _QUESTIONS = 2, 2, 8
_FRONT = "ray::ServeReplica:f2l:Front"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}
    folder = tmp_path_factory.mktemp("cluster")
    with running(folder, _ENGINES, _FRONTS, RAY_SERVE_ENABLE_HA_PROXY="1", **ports) as service:
        yield service


def asked(service: Service) -> list[str]:
    """The videos that all engines were asked about since they run."""
    return [video for url in service.engines.values() for video in httpx.get(f"{url}/asked").json()["asked"]]


def haproxies(service: Service) -> list[int]:
    """The processes of HAProxy that have a configuration in the folder of the service's Ray."""
    return [pid for pid, words in processes() if "haproxy" in words[0] and service.node.folder in " ".join(words)]


def fronts(service: Service) -> list[int]:
    """The processes of the fronts."""
    found = [pid for pid, words in processes() if words[0].startswith(_FRONT)]
    commands = dict(processes())
    return [pid for pid in found if service.node.folder in " ".join(commands.get(parent_of(pid), []))]


def posted(service: Service, question: dict[str, object]) -> httpx.Response:
    """The answer to a question whose head and body arrive one after the other, as from OpenAI's client."""
    with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
        return client.post("/v1/chat/completions", json=question)


def test_questions_go_through_haproxy_and_a_video_has_one_engine(service):
    assert haproxies(service)
    homes = {video: service.engine_of(video) for video in (f"file-{number}" for number in range(12))}
    assert {video: service.engine_of(video) for video in homes} == homes
    assert len(set(homes.values())) == _ENGINES


def test_a_stream_arrives_piece_by_piece_and_whole(service):
    question = {"model": "file-0", "messages": [], "stream": True, "max_tokens": 5, "ms": 100}
    with service.client.stream("POST", "/v1/chat/completions", json=question) as answer:
        pieces = [piece for piece in answer.iter_text() if piece]
    assert len(pieces) > 1
    assert "".join(pieces).count("data: ") == 6
    assert last_event("".join(pieces)) == "[DONE]"


@pytest.mark.parametrize("what", ["front", "engine"])
def test_a_question_without_an_answer_yet_is_asked_elsewhere_when_what_has_it_is_killed(service, what):
    until(lambda: len(service.engines) == _ENGINES and len(fronts(service)) == _FRONTS, 120)
    video = f"file-asked-before-a-kill-of-{what}"
    question = {"model": video, "messages": [], "max_tokens": 1, "first_ms": 4000}
    home = service.engine_of(video)
    victim = process_at(str(home)) if what == "engine" else fronts(service)[0]
    before = asked(service).count(video)
    with ThreadPoolExecutor(_QUESTIONS) as pool:
        answers = [pool.submit(posted, service, question) for _ in range(_QUESTIONS)]
        until(lambda: asked(service).count(video) == before + _QUESTIONS, 60)
        os.kill(victim, signal.SIGKILL)
        assert [answer.result().status_code for answer in answers] == [200] * _QUESTIONS
    if what == "front":  # it had some of them, which the other one asked again
        assert asked(service).count(video) > before + _QUESTIONS
    else:
        assert home not in {answer.result().json()["engine"] for answer in answers}
