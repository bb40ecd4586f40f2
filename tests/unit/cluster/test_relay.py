"""A front before small HTTP servers that stand for engines, all over real connections."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack

import httpx
import pytest

from f2l_vllm.cluster import incoming
from f2l_vllm.cluster.membership import Affinity, Membership
from f2l_vllm.cluster.relay import Engine, Relay
from tests.support import fake_engine
from tests.support.balancers import StandIn
from tests.support.serving import serving

QUESTION = {"model": "file-1", "messages": []}
STREAM = {**QUESTION, "stream": True}


class Fronted:
    """A front before two stand-ins."""

    def __init__(self) -> None:
        self.engines = Membership()
        self.stand_ins = [StandIn(0), StandIn(1)]
        self.affinity = Affinity(self.engines, places=8, concurrency=8)
        self.engines.update({str(one.number): f"http://{one.host}:{one.port}" for one in self.stand_ins})
        self.relay = Relay(self.choose, self.engines, find_seconds=0.2)
        self.client = httpx.Client(timeout=20)

    async def choose(self, key: str, tried: Collection[str]) -> Engine:
        if (name := self.affinity.choose(key, tried)) is None:
            raise TimeoutError
        return Engine(name, self.engines.urls()[name])

    def post(self, path: str = "/v1/chat/completions", **question: object) -> httpx.Response:
        return self.client.post(path, json={**QUESTION, **question})

    def home(self) -> StandIn:
        """The engine that the question's video belongs to."""
        return self.stand_ins[int(self.affinity.choose("file-1", ()) or 0)]

    def other(self) -> StandIn:
        return self.stand_ins[1 - self.home().number]


@pytest.fixture
def front() -> Iterator[Fronted]:
    fronted = Fronted()
    with serving(fronted.relay.app()) as url:
        fronted.client.base_url = url
        yield fronted
        fronted.client.close()
        for one in fronted.stand_ins:
            one.kill()


def events(answer: httpx.Response) -> list[str]:
    return [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]


def wait_until(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_stream_comes_as_the_engine_sends_it(front):
    front.home().gate.release(1)
    with front.client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"data: 0\n\n"  # the others wait at the gate
        front.home().gate.release(2)
        assert b"".join(pieces) == b"data: 1\n\ndata: 2\n\n"


def test_questions_about_a_video_go_to_one_engine_until_it_is_gone(front):
    home, other = front.home(), front.other()
    assert {front.post().json()["server"] for _ in range(8)} == {home.number}
    home.kill()
    assert front.post().json()["server"] == other.number
    assert (other.asked, home.asked) == (1, 8)


def test_a_question_is_asked_again_while_no_byte_has_gone_out(front):
    home, other = front.home(), front.other()
    other.gate.release(3)
    threading.Thread(target=lambda: (wait_until(lambda: home.held), home.kill())).start()
    answer = front.client.post("/v1/chat/completions", json=STREAM)  # the head of home's answer has come by then
    assert events(answer) == ["0", "1", "2"]
    assert (home.asked, other.asked) == (1, 1)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_stream_that_breaks_off_ends_with_an_error(front, path):
    home, other = front.home(), front.other()
    home.gate.release(1)
    threading.Thread(target=lambda: (wait_until(lambda: home.gate._value == 0 and home.held), home.kill())).start()
    answer = front.client.post(path, json=STREAM)
    first, error = answer.text.split("\n\n", 1)
    assert (answer.status_code, first) == (200, "data: 0")
    assert error.endswith("\n\n")
    assert error.startswith("event: error\n") == (path == "/v1/messages")
    assert json.loads(error.partition("data: ")[2])["error"]["code"] == "engine_lost"
    assert other.asked == 0


def test_what_says_503_is_asked_elsewhere_and_its_answer_passed_on_if_all_say_so(front):
    front.home().status = 503
    answer = front.post()
    assert (answer.status_code, answer.json()["server"]) == (200, front.other().number)
    front.other().status = 503
    answer = front.post()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert (front.home().asked, front.other().asked) == (2, 2)


def test_a_request_without_a_body_waits_for_its_answer_too(front):
    home, other = front.home(), front.other()
    other.kill()
    front.post()  # from here on there is a connection to the engine
    threading.Thread(target=lambda: (wait_until(lambda: home.held), time.sleep(0.1), home.gate.release(1))).start()
    assert front.client.get("/hold").status_code == 200


def test_without_engines_a_request_says_when_to_come_again(front):
    for one in front.stand_ins:
        one.kill()
    answer = front.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_lost")
    assert answer.headers["retry-after"] == "2"
    front.engines.update({})
    answer = front.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_engine")


def test_an_upload_is_passed_on_as_it_comes_and_never_sent_twice(front):
    piece = b"x" * (1 << 20)
    went_on = threading.Event()

    def body() -> Iterator[bytes]:
        yield piece
        yield piece
        went_on.wait(10)
        yield piece

    def upload() -> None:
        answers.append(front.client.post("/v1/files", content=body(), headers={"content-length": str(3 << 20)}))

    answers: list[httpx.Response] = []
    thread = threading.Thread(target=upload)
    thread.start()
    wait_until(lambda: any(one.received >= 2 << 20 for one in front.stand_ins))
    went_on.set()
    thread.join()
    assert answers.pop().json()["bytes"] == 3 << 20

    for one in front.stand_ins:
        one.received = 0
    went_on.clear()
    thread = threading.Thread(target=upload)
    thread.start()
    wait_until(lambda: any(one.received >= 2 << 20 for one in front.stand_ins))
    working, idle = sorted(front.stand_ins, key=lambda one: -one.received)
    working.kill()
    went_on.set()
    thread.join()
    assert answers[0].json()["error"]["code"] == "engine_lost"
    assert idle.received == 0


def test_an_upload_goes_elsewhere_if_its_engine_cannot_be_reached(front):
    front.home().kill()
    sizes = [front.client.post("/v1/files", content=b"x" * size).json()["bytes"] for size in (10, 3 << 20, 10, 3 << 20)]
    assert sizes == [10, 3 << 20, 10, 3 << 20]


def test_a_client_that_leaves_ends_the_work_at_the_engine(front):
    home = front.home()
    home.gate.release(1)
    with front.client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
        pieces = answer.iter_raw()
        assert next(pieces)
        assert front.engines.loads()[str(home.number)] == 1
    wait_until(lambda: front.engines.loads()[str(home.number)] == 0)
    home.gate.release(2)
    wait_until(lambda: not home.connections)


class Raw:
    """An engine that sends these bytes and closes the connection."""

    def __init__(self, answer: bytes) -> None:
        self.asked = b""
        self._answer, self._socket = answer, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                self.asked = connection.recv(1 << 16)
                connection.sendall(self._answer)


def test_half_an_answer_that_is_no_stream_is_not_taken_for_whole(front):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    for framing in (b"content-length: 100\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"):
        front.engines.update({"raw": Raw(head + framing).url})
        with pytest.raises(httpx.RemoteProtocolError):
            front.post()


def test_half_an_event_is_not_sent(front):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    front.engines.update({"raw": Raw(head + b"14\r\ndata: one\n\ndata: tw\r\n").url})
    one, error = events(front.client.post("/v1/chat/completions", json=STREAM))
    assert one == "one"
    assert json.loads(error)["error"]["code"] == "engine_lost"


def test_the_key_goes_to_the_engine_and_the_engines_load_stays_here(front):
    raw = Raw(b"HTTP/1.1 200 OK\r\nx-f2l-load: 7\r\nx-f2l-file: file-1\r\ncontent-length: 2\r\n\r\n{}")
    front.engines.update({"raw": raw.url})
    answer = front.client.post("/v1/chat/completions?a=%2F", json=QUESTION, headers={"Authorization": "Bearer secret"})
    head = raw.asked.decode().lower()
    assert head.startswith("post /v1/chat/completions?a=%2f http/1.1")
    assert "authorization: bearer secret" in head
    assert answer.headers["x-f2l-file"] == "file-1"
    assert "x-f2l-load" not in answer.headers
    assert front.engines.loads() == {"raw": 6}  # one of the seven was this question


def test_a_body_that_pauses_is_refused(front, monkeypatch):
    monkeypatch.setattr(incoming, "_IDLE_SECONDS", 0.1)
    with socket.create_connection((front.client.base_url.host, front.client.base_url.port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_the_fake_engine_answers_as_the_tests_of_ray_serve_need_it():
    with ExitStack() as stack:
        url = stack.enter_context(serving(fake_engine.build(7)))
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "stream": True, "max_tokens": 2})
        assert [json.loads(event).get("engine") for event in events(answer)[:-1]] == [7, 7]
        assert answer.headers["x-f2l-load"] == "0"
        assert httpx.get(f"{url}/asked").json() == {"engine": 7, "asked": ["m"]}
