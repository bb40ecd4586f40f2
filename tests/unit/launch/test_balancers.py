"""Every load balancer of `launch/` keeps the promises of docs/many-servers.md."""

import contextlib
import http.client
import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.haproxy import find_haproxy, haproxy
from f2l_vllm.server_process import LOOPBACK, free_port
from tests.support.balancers import BY_NAME, CONFIGS, StandIn, balanced, find
from tests.support.stages import until

CHAT, COMPLETIONS, FILES = "/v1/chat/completions", "/v1/completions", "/v1/files"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
VIDEOS = [f"file-{number:024x}" for number in range(40)]


@pytest.fixture(params=CONFIGS)
def balancer(request):
    if find(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def servers():
    servers = [StandIn(0)]
    servers += [StandIn(number, servers[0].port) for number in (1, 2)]
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def client(balancer, tmp_path, servers):
    with balanced(balancer, tmp_path, servers) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


def about(video, **more):
    return {"model": video, "messages": [{"role": "user", "content": "What is shown?"}], **more}


def ask(client, video, **more):
    """The number of the server that answers."""
    return client.post(CHAT, json=about(video, **more)).raise_for_status().json()["server"]


def test_questions_of_a_video_go_to_one_server(client):
    homes = {video: ask(client, video) for video in VIDEOS}
    assert {*homes.values()} == {0, 1, 2}
    for video, home in homes.items():
        content = [{"type": "file", "file": {"file_id": video}}, {"type": "text", "text": "What is shown?"}]
        assert ask(client, "base", messages=[{"role": "user", "content": content}]) == home
        for route, told in ((COMPLETIONS, "prompt"), (RESPONSES, "input"), (MESSAGES, "system")):
            assert client.post(route, json={"model": video, told: "It is"}).json()["server"] == home


def test_questions_of_a_popular_video_are_shared(client, servers, balancer):
    if balancer == "nginx":
        pytest.skip("nginx does not bound the load of a server")
    with contextlib.ExitStack() as streams:
        for _ in range(12):
            streams.enter_context(client.stream("POST", CHAT, json=about(VIDEOS[0], stream=True)))
        assert max(server.asked for server in servers) <= 6  # 1.25 times its share, and one


def test_questions_without_a_video_go_to_several_servers(client, servers):
    with contextlib.ExitStack() as streams:
        for _ in range(20):
            streams.enter_context(client.stream("POST", CHAT, json=about("base", stream=True)))
        assert sum(server.asked > 0 for server in servers) > 1


def test_everything_else_goes_to_the_server_with_the_fewest_connections(client, servers):
    with ThreadPoolExecutor() as pool:
        for number in range(1, 4):
            pool.submit(client.get, "/hold")
            until(lambda wanted=number: sum(server.held for server in servers) == wanted, "a request at a server")
        assert [server.held for server in servers] == [1, 1, 1]
        servers[1].gate.release()
        until(lambda: not servers[1].held, "its answer")
        assert [client.get("/v1/models").json()["server"] for _ in range(3)] == [1, 1, 1]
        for server in servers:
            server.gate.release()


def test_an_event_of_a_stream_arrives_before_the_next_is_sent(client, servers):
    gate = servers[ask(client, VIDEOS[0])].gate
    with client.stream("POST", CHAT, json=about(VIDEOS[0], stream=True)) as answer:
        lines = answer.iter_lines()
        for number in range(3):
            gate.release()
            assert next(lines) == f"data: {number}"
            assert next(lines) == ""
        assert [*lines] == []


def test_a_stream_that_is_cut_off_does_not_look_complete(client, servers):
    home = servers[ask(client, VIDEOS[0])]
    with client.stream("POST", CHAT, json=about(VIDEOS[0], stream=True)) as answer:
        lines = answer.iter_lines()
        home.gate.release()
        assert next(lines) == "data: 0"
        home.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)


def test_an_upload_is_passed_on_while_it_is_sent(client, servers):
    half = bytes(1 << 20)

    def body():
        yield half
        until(lambda: any(server.received for server in servers), "the first half at a server")
        yield half

    answer = client.post(FILES, content=body(), headers={"Content-Length": str(2 * len(half))})
    assert answer.json()["bytes"] == 2 * len(half)


@pytest.mark.parametrize("megabytes", [3, 12])
def test_a_large_question_arrives_whole(client, megabytes):
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (megabytes << 20)}}]
    question = json.dumps(about(VIDEOS[0], messages=[{"role": "user", "content": content}]))
    answer = client.post(CHAT, content=question, headers={"Content-Type": "application/json"})
    assert answer.json()["bytes"] == len(question)


def test_no_question_fails_that_had_no_answer_yet_when_its_server_was_killed(client, servers):
    homes = {video: ask(client, video) for video in VIDEOS}
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, client, next(video for video in VIDEOS if homes[video] == 0), hold=True)
        until(lambda: servers[0].held, "the question at its server")
        servers[0].kill()
        for server in servers:
            server.gate.release()
        assert waiting.result() != 0
    found = {video: ask(client, video) for video in VIDEOS}
    assert 0 not in found.values()
    moved = [video for video, home in homes.items() if home not in (0, found[video])]
    assert len(moved) <= 3  # Maglev moves one now and then


def test_everything_else_goes_on_when_a_server_was_killed(client, servers):
    servers[0].kill()
    found = [client.get("/v1/models").json()["server"] for _ in range(9)]
    found += [client.post(FILES, content=bytes(1 << 20)).json()["server"] for _ in range(9)]
    assert {*found} == {1, 2}


def test_a_server_that_is_back_is_asked_again(client, servers):
    home = ask(client, VIDEOS[0])
    servers[home].kill()
    assert ask(client, VIDEOS[0]) != home
    again = StandIn(home, servers[home].port)
    try:
        until(lambda: ask(client, VIDEOS[0]) == home, "the server is asked again", pause=0.1)
    finally:
        again.kill()


@pytest.mark.parametrize("balancer", [BY_NAME], indirect=True)
def test_servers_that_join_or_leave_the_name_are_asked_or_left_alone(client, servers):
    homes = {video: ask(client, video) for video in VIDEOS}
    servers.append(StandIn(3, servers[0].port))
    until(lambda: 3 in {ask(client, video) for video in VIDEOS}, "the new server is asked", pause=0.1)
    moved = [video for video, home in homes.items() if ask(client, video) not in (home, 3)]
    assert moved == []
    left = servers.pop(0)  # runs on
    try:
        until(lambda: 0 not in {ask(client, video) for video in VIDEOS}, "the one that left is not", pause=0.1)
    finally:
        left.kill()


def test_a_question_refused_with_503_is_asked_elsewhere(client, servers):
    home = ask(client, VIDEOS[0])
    servers[home].status = 503
    assert ask(client, VIDEOS[0]) != home


def test_a_question_refused_with_400_is_not_asked_again(client, servers):
    for server in servers:
        server.status = 400
    assert client.post(CHAT, json=about(VIDEOS[0])).status_code == 400
    assert sum(server.asked for server in servers) == 1


@pytest.mark.parametrize("balancer", ["haproxy"], indirect=True)
def test_when_no_server_is_there_the_client_learns_when_to_ask_again(client, servers):
    for server in servers:
        server.kill()
    for path in (CHAT, FILES):
        answer = client.post(path, json=about(VIDEOS[0]))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json()["error"]["code"] == "no_server"


def test_when_all_servers_refuse_the_client_learns_when_to_ask_again(client, servers):
    for server in servers:
        server.status = 503
    for _ in range(3):
        answer = client.post(CHAT, json=about(VIDEOS[0]))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    for server in servers:
        server.status = 200
    ask(client, VIDEOS[0])


@pytest.mark.skipif(find_haproxy() is None, reason="HAProxy is not installed")
def test_a_client_that_keeps_its_connection_and_a_stream_go_on_when_haproxy_is_reloaded(servers, tmp_path):
    address, said = f"{LOOPBACK}:{free_port()}", tmp_path / "haproxy.log"
    addresses = [f"{server.host}:{server.port}" for server in servers]
    with (
        haproxy(addresses, address, tmp_path, reloads=True) as process,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        until(lambda: listens(address), "HAProxy")
        kept = http.client.HTTPConnection(address)
        assert served(kept) == 200
        home = servers[ask(client, VIDEOS[0])]
        with client.stream("POST", CHAT, json=about(VIDEOS[0], stream=True)) as answer:
            lines = answer.iter_lines()
            home.gate.release()
            assert next(lines) == "data: 0"
            until(lambda: catches(process.pid, signal.SIGUSR2), "HAProxy's master")
            process.send_signal(signal.SIGUSR2)
            until(lambda: said.read_text().count("Loading success") == 2, "the new worker")
            time.sleep(0.5)  # the old one learns that it ends
            assert served(kept) == 200
            home.gate.release(2)
            assert [line for line in lines if line] == ["data: 1", "data: 2"]


def listens(address):
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
        return True
    return False


def catches(pid, signum):
    """Whether a process has a handler of a signal; HAProxy's master ignores SIGUSR2 until its first worker serves."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> signum - 1 & 1)


def served(connection):
    """The status of a small request on a connection that is open already, or opens now."""
    connection.request("GET", "/v1/models")
    answer = connection.getresponse()
    answer.read()
    return answer.status
