"""Servers beside each other, that stop, start again, are full; on PostgreSQL if it is there."""

import http.client
import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest

from f2l_vllm.catalog.catalog import Catalog
from tests.support.postgres import temporary_postgres
from tests.support.server import Server
from tests.support.videos import write_video

QUESTION = [{"role": "user", "content": "What is shown?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}
KEY, OTHER_KEY = "secret", "another secret"
GRACE = 2.0  # of the second server
CHUNKS = ("--chunk-seconds", "1", "--max-chunks", "3")


def ask(server, model, **options):
    response = server.client.chat.completions.create(model=model, messages=QUESTION, **GREEDY, **options)
    return response.choices[0].message.content


def alive(pids):
    """Those that still run; a zombie does not."""
    running = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                running.add(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("life") / "home"


@pytest.fixture(scope="module")
def postgres():
    """A real one; None where it is not installed, and these servers have SQLite."""
    with temporary_postgres() as postgres:
        yield postgres


@pytest.fixture(scope="module")
def catalog_url(postgres, home):
    return f"sqlite:///{home / 'catalog.sqlite3'}" if postgres is None else postgres.new_database()


@pytest.fixture(scope="module")
def details():
    """What the first life said of its videos."""
    return {}


@pytest.fixture(scope="module")
def beginning(home, hypernetwork_model, catalog_url):
    """The server of the first life, as long as it runs."""
    env = {"F2L_DATABASE_URL": catalog_url, "CUDA_HOME": "/none"}  # as on a machine that never had a GPU
    with Server(hypernetwork_model, home, "--api-key", KEY, *CHUNKS, api_key=KEY, env=env) as server:
        yield server


@pytest.fixture(scope="module")
def first_life(beginning, home, clips, details):
    """It made two videos ready and was stopped with Ctrl-C: its ids and answers, and how it ended."""
    server = beginning
    assert httpx.get(f"{server.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
    answers = {}
    for clip in clips[:2]:
        file = server.upload(clip)
        details[file.id] = file.model_extra["f2l"]
        answers[file.id] = ask(server, file.id)
    long = server.upload(write_video(home.parent / "long.mp4", frames=90, fps=10))
    details[long.id] = long.model_extra["f2l"]
    server.client.files.delete(long.id)
    children = set(server.descendants())
    code = server.stop()
    return answers, code, children


@pytest.fixture(scope="module")
def second_life(home, hypernetwork_model, catalog_url, first_life):
    """The same data folder served again, without workers, with room for one waiting video, for two tenants."""
    tenants = home.parent / "tenants.json"
    tenants.write_text(json.dumps({"default": [KEY], "other": [OTHER_KEY]}))
    flags = ("--hypernetwork-workers", "0", "--queue-limit", "1", "--tenants", str(tenants), *CHUNKS)
    env = {"F2L_DATABASE_URL": catalog_url, "F2L_SHUTDOWN_SECONDS": str(GRACE)}
    with Server(hypernetwork_model, home, *flags, api_key=KEY, env=env) as server:
        yield server


def test_two_servers_on_one_machine_share_nothing(beginning, server, clips):
    mine, theirs = beginning.upload(clips[0]).id, server.upload(clips[0]).id
    for one, other_id in ((beginning, theirs), (server, mine)):
        with pytest.raises(openai.NotFoundError) as error:
            ask(one, other_id)
        assert error.value.code == "video_not_found"
        assert other_id not in {file.id for file in one.client.files.list()}
    answer = ask(server, theirs)
    assert set(beginning.descendants()).isdisjoint(server.descendants())
    ask(beginning, mine)
    beginning.client.files.delete(mine)
    assert ask(server, theirs) == answer
    server.client.files.delete(theirs)


def test_videos_that_come_and_go_leave_nothing_behind(beginning, home, catalog_url, clips, tmp_path):
    films = clips[:2]
    kept = [beginning.upload(film).id for film in films]
    answers = [ask(beginning, file_id) for file_id in kept]
    assert len(set(answers)) == 2

    def cycle(index):
        path = tmp_path / f"{index}.mp4"
        skipped = b"\0\0\0\x0cfree" + index.to_bytes(4, "big")  # other bytes, the same film
        path.write_bytes(films[index % 2].read_bytes() + skipped)
        file_id = beginning.upload(path).id
        assert ask(beginning, file_id) == answers[index % 2]
        beginning.client.files.delete(file_id)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(cycle, range(12)))
    for file_id in kept:
        beginning.client.files.delete(file_id)
    catalog = Catalog(catalog_url)
    try:
        assert catalog.counts() == ({}, 0, 0)
        assert catalog.recent_adapters(100) == []
        assert catalog.purge(time.time()) >= 14
    finally:
        catalog.close()
    kept_files = [path for folder in ("adapters", "videos", "tmp") for path in (home / folder).rglob("*")]
    assert [path for path in kept_files if path.is_file()] == []
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{beginning.url}/metrics").text.splitlines())
    assert float(lines["f2l_adapters_resident"]) == float(lines["f2l_adapter_leases"]) == 0


def test_a_database_that_is_away_is_said_and_found_again(beginning, postgres, home, clips):
    if postgres is None:
        pytest.skip("PostgreSQL is not installed: SQLite is never away")
    file_id = beginning.upload(clips[0]).id
    answer = ask(beginning, file_id)
    workers = {pid for pid, command in beginning.descendants().items() if command.startswith("ray::Hyper")}
    postgres.stop()
    try:
        for call in (lambda: ask(beginning, file_id), lambda: beginning.upload(clips[1]).id):
            with pytest.raises(openai.InternalServerError) as error:
                call()
            assert (error.value.status_code, error.value.code) == (503, "catalog_busy")
            assert int(error.value.response.headers["Retry-After"]) > 0
        assert httpx.get(f"{beginning.url}/ready").status_code == 200
    finally:
        postgres.start()
    assert ask(beginning, file_id) == answer
    deadline = time.monotonic() + 30
    while len(stored := [path for path in (home / "videos").rglob("*") if path.is_file()]) > 1:
        assert time.monotonic() < deadline, stored  # what was refused goes when the catalog can be asked
        time.sleep(0.1)
    other = beginning.upload(clips[1]).id
    assert ask(beginning, other) not in ("", answer)
    for left in (file_id, other):
        beginning.client.files.delete(left)
    assert workers <= set(beginning.descendants())  # none was lost over it


def listening(pids):
    """Addresses, in hex, that these processes listen at: all TCP sockets in the state LISTEN that they hold."""
    held = set()
    for pid in pids:
        with suppress(FileNotFoundError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    held.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in held:
                found.add(local.split(":")[0])
    return found


def test_all_that_listens_listens_on_loopback(beginning):
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    found = listening({beginning.process.pid, *beginning.descendants()})
    assert found
    assert found <= loopback


def test_the_log_of_a_start_is_short_and_ends_with_the_address(beginning):
    said = beginning.log.read_text().splitlines()
    ready = next(index for index, line in enumerate(said) if f"ready: {beginning.url} (" in line)
    assert ready < 15, said
    for line in said[: ready + 1]:
        assert re.match(r"\d\d-\d\d \d\d:\d\d:\d\d INFO (server|engine|pool): ", line), line


def test_ctrl_c_stops_everything_that_was_started_and_nothing_else(beginning, first_life, server, clips):
    _, code, children = first_life
    server.client.files.delete(server.upload(clips[0]).id)
    assert code == 0
    assert len(children) > 3  # engine, Ray, worker
    assert [line.split(": ")[1].split()[0] for line in beginning.log.read_text().splitlines()[-2:]] == [
        "stopping",
        "stopped",
    ]
    deadline = time.monotonic() + 20
    while (left := alive(children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()


def test_long_videos_become_chunks_and_too_long_ones_say_so(first_life, details, clips):
    *ready, long = details.values()
    for video in ready:
        assert video["rank"] == 4 * (len(video["spans"]) + 1)
        assert [span[0] for span in video["spans"]] == list(range(len(video["spans"])))
    assert len(ready[0]["spans"]) > 1
    assert long["stage"] == "error"
    assert long["error"]["code"] == "video_too_long"
    assert "--chunk-seconds" in long["error"]["message"]


def test_ready_videos_answer_after_a_restart_without_work_done_again(first_life, second_life):
    answers, _, _ = first_life
    assert len(set(answers.values())) == 2
    # No worker runs here, so these answers come from what the first life left.
    assert {model: ask(second_life, model) for model in answers} == answers


def test_a_full_queue_says_when_to_come_back(second_life, clips):
    client = second_life.client
    waiting = client.files.create(file=clips[2], purpose="vision")
    with pytest.raises(openai.RateLimitError) as error:
        client.files.create(file=clips[3], purpose="vision")
    assert error.value.code == "queue_full"
    assert int(error.value.response.headers["Retry-After"]) >= 1
    client.files.create(file=clips[2], purpose="vision")  # the same bytes need no room
    client.files.create(file=clips[0], purpose="vision")  # nor do bytes that are ready
    with pytest.raises(openai.ConflictError) as error:
        ask(second_life, waiting.id, extra_body={"f2l": {"wait": 0.2}})
    assert error.value.code == "video_not_ready"
    kept = {path.name for path in (second_life.home / "videos").rglob("*") if path.is_file()}
    assert len(kept) == 3  # two ready, one waiting, none of the refused


def test_without_the_key_nothing_is_told(second_life, first_life):
    file_id = next(iter(first_life[0]))
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", f"/v1/files/{file_id}"),
        ("GET", f"/v1/files/{file_id}/content"),
        ("GET", f"/v1/files/{file_id}/adapter"),
        ("DELETE", f"/v1/files/{file_id}"),
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
    ):
        assert httpx.request(method, second_life.url + path).status_code == 401


def test_no_route_answers_without_the_key(second_life, first_life):
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": next(iter(first_life[0])), "messages": QUESTION}
    for path in ("/invocations", "/tokenize", "/detokenize", "/generative_scoring", "/openapi.json", "/docs"):
        assert httpx.post(second_life.url + path, json=body).status_code == 401, path
        assert httpx.post(second_life.url + path, json=body, headers=headers).status_code in (404, 405), path
    for path in ("/health", "/ready", "/metrics", "/metrics/"):
        assert httpx.get(second_life.url + path, follow_redirects=True).status_code == 200


def test_another_tenants_files_do_not_exist(second_life, first_life):
    file_id = next(iter(first_life[0]))
    other = second_life.client.with_options(api_key=OTHER_KEY)
    part = {"type": "file", "file": {"file_id": file_id}}
    content = [part, {"type": "text", "text": "What is shown?"}]
    for call in (
        lambda: other.files.retrieve(file_id),
        lambda: other.files.content(file_id),
        lambda: other.files.delete(file_id),
        lambda: other.models.retrieve(file_id),
        lambda: other.chat.completions.create(model=file_id, messages=QUESTION),
        lambda: other.chat.completions.create(model="base", messages=[{"role": "user", "content": content}]),
        lambda: other.chat.completions.create(model=file_id, messages=QUESTION, extra_body={"f2l": {"mode": "frames"}}),
        lambda: other.completions.create(model=file_id, prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.code == "video_not_found"
    headers = {"Authorization": f"Bearer {OTHER_KEY}"}
    for path in ("events", "adapter", "content"):
        response = httpx.get(f"{second_life.url}/v1/files/{file_id}/{path}", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "video_not_found")
    assert list(other.files.list()) == []
    assert [model.id for model in other.models.list()] == ["base"]
    with pytest.raises(openai.BadRequestError):
        other.files.list(after=file_id)
    assert file_id in {model.id for model in second_life.client.models.list()}


def test_what_one_tenant_left_under_a_uuid_is_not_there_for_another(second_life):
    other = second_life.client.with_options(api_key=OTHER_KEY)
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
    left = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixel}"}, "uuid": "logo"}
    named = {**left, "image_url": None}

    def ask(client, part):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is shown?"}]}]
        return client.chat.completions.create(model="base", messages=messages, max_tokens=4)

    ask(second_life.client, left)
    ask(second_life.client, named)
    with pytest.raises(openai.APIStatusError) as error:
        ask(other, named)
    assert 400 <= error.value.status_code < 500
    for uuid in (901, 2.5, True, ["logo"]):  # what is no text would be nobody's own
        with pytest.raises(openai.BadRequestError) as refused:
            ask(second_life.client, {**left, "uuid": uuid})
        assert refused.value.code == "invalid_uuid"


def test_the_same_bytes_are_one_adapter_and_two_files(second_life, first_life, clips):
    other = second_life.client.with_options(api_key=OTHER_KEY)
    mine = other.files.create(file=clips[0], purpose="vision")
    assert mine.status == "processed"  # no worker runs here
    assert mine.id not in first_life[0]
    theirs = next(iter(first_life[0]))
    answer = other.chat.completions.create(model=mine.id, messages=QUESTION, **GREEDY).choices[0].message.content
    assert answer == first_life[0][theirs]
    other.files.delete(mine.id)
    assert ask(second_life, theirs) == answer


def test_a_new_tenant_needs_no_restart(second_life, home):
    tenants = home.parent / "tenants.json"
    third = second_life.client.with_options(api_key="a third")
    with pytest.raises(openai.AuthenticationError):
        third.models.list()
    tenants.write_text(json.dumps({"default": [KEY], "other": [OTHER_KEY], "third": ["a third"]}))
    assert [model.id for model in third.models.list()] == ["base"]


def test_an_upload_over_the_cap_is_refused_before_it_is_sent(second_life):
    connection = http.client.HTTPConnection(second_life.url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Authorization", f"Bearer {KEY}")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(3 << 30))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "file_too_large")
    assert httpx.get(f"{second_life.url}/health").status_code == 200


def streamed(client, model, begun, **options):
    """What a client saw of a streamed answer: its pieces, and the error that it ended with."""
    pieces = []
    try:
        extra = {"ignore_eos": True}
        for chunk in client.chat.completions.create(
            model=model, messages=QUESTION, stream=True, extra_body=extra, **options
        ):
            pieces.append(chunk.choices[0].delta.content)
            begun.set()
    except openai.APIError as error:
        return pieces, error.code
    return pieces, None


def slow_upload(url, begun):
    """The first line and the body that an upload is answered with which never ends."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Authorization", f"Bearer {KEY}")
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", "100000000")
    connection.endheaders()
    connection.send(b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n')
    begun.set()
    response = connection.getresponse()
    return response.status, json.loads(response.read())["error"]["code"]


def test_a_server_that_stops_lets_answers_end_and_tells_whom_it_cuts_off(second_life, first_life, clips):
    """Without workers a video waits for ever: so would its question and its events. The module's last use of it."""
    server, model = second_life, next(iter(first_life[0]))
    file = server.client.files.create(file=clips[2], purpose="vision")
    headers = {"Authorization": f"Bearer {KEY}"}
    long = {"max_tokens": 900, "temperature": 0}
    # The client is made now: on a busy machine that would outlast the grace.
    with ThreadPoolExecutor(16) as threads, httpx.Client(base_url=server.url) as looking:
        begun = [threading.Event() for _ in range(5)]
        streams = [threads.submit(streamed, server.client, model, event, **long) for event in begun[:4]]
        upload = threads.submit(slow_upload, server.url, begun[4])
        whole = threads.submit(ask, server, model, extra_body={"ignore_eos": True, "max_tokens": 900})
        waiting = threads.submit(ask, server, file.id, extra_headers={"X-F2L-Wait": "3600"})
        url = f"{server.url}/v1/files/{file.id}/events"
        events = threads.submit(httpx.get, url, headers=headers, timeout=120)
        for event in begun:
            assert event.wait(60)
        time.sleep(1)
        assert not any(future.done() for future in (*streams, upload, whole, waiting, events))
        short = threads.submit(streamed, server.client, model, threading.Event(), max_tokens=3)
        time.sleep(0.1)
        parts = set(server.descendants())
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError) as error:
            waiting.result(30)  # told at once
        # All at a time: on a busy machine one after the other would outlast the grace.
        late = threads.submit(ask, server, model)
        checks = [threads.submit(looking.get, path) for path in ("/health", "/ready")]
        assert error.value.code == "shutting_down"
        assert json.loads(events.result(30).text.strip().rsplit("data: ", 1)[1])["error"]["code"] == "shutting_down"
        with pytest.raises(openai.InternalServerError) as error:
            late.result(30)
        assert (error.value.status_code, error.value.code) == (503, "shutting_down")
        assert int(error.value.response.headers["Retry-After"]) > 0
        assert [check.result(30).status_code for check in checks] == [200, 503]
        assert server.process.wait(60) == 0
        while alive(parts) and time.monotonic() - began < GRACE + 5:
            time.sleep(0.01)  # those that end with it
        assert time.monotonic() - began < GRACE + 5
        assert short.result(30)[1] is None
        for stream in streams:
            pieces, code = stream.result(30)
            assert len(pieces) > 10
            assert code == "shutting_down"
        with pytest.raises(openai.InternalServerError) as error:
            whole.result(30)
        assert (error.value.status_code, error.value.code) == (503, "shutting_down")
        assert upload.result(30) == (503, "shutting_down")
    said = [line for line in server.log.read_text().splitlines() if "uvicorn.access" not in line]
    assert said[-2].endswith("(a second signal ends them)")
    assert "stopped after" in said[-1]
