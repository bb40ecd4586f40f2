"""What an operator relies on in the life of a file, over HTTP: pinning, expiry by disuse, a catalog that is locked."""

import socket
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is shown?"}]


@pytest.fixture
def file(server, clips):
    file = server.upload(clips[1])
    yield file
    server.client.files.delete(file.id)


def update(server, file_id, content):
    return httpx.post(f"{server.url}/v1/files/{file_id}", content=content, timeout=60)


def test_a_file_is_pinned_and_let_go(server, clips):
    expiry = {"expires_after[anchor]": "last_used_at", "expires_after[seconds]": "3600", "f2l[pinned]": "true"}
    answer = httpx.post(
        f"{server.url}/v1/files",
        data={"purpose": "vision", **expiry},
        files={"file": clips[1].read_bytes()},
        timeout=60,
    )
    file = answer.json()
    assert (file["f2l"]["pinned"], file["expires_at"]) == (True, None)
    file = update(server, file["id"], '{"f2l": {"pinned": false}}').json()
    assert not file["f2l"]["pinned"]
    assert file["expires_at"] >= file["created_at"] + 3600
    refused = {"": "request", "[]": "request", '{"f2l": {"pinned": 1}}': "request", b"\xff": "json"}
    for content, what in refused.items():
        answer = update(server, file["id"], content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, f"invalid_{what}")
    answer = update(server, file["id"], "[" * 10000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_complex")
    assert update(server, "file-none", '{"f2l": {"pinned": true}}').json()["error"]["code"] == "video_not_found"
    server.client.files.delete(file["id"])


def test_a_locked_catalog_is_waited_for_then_said_and_questions_go_on(server, clips, file):
    def ask():
        options = {"temperature": 0, "max_tokens": 8}
        response = server.client.chat.completions.create(model=file.id, messages=QUESTION, **options)
        return response.choices[0].message.content

    before = ask()
    other = sqlite3.connect(server.home / "catalog.sqlite3", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    writes = (
        lambda: server.client.files.create(file=clips[2], purpose="vision"),
        lambda: server.client.files.delete(file.id),
        lambda: server.client.post(f"/files/{file.id}", body={"f2l": {"pinned": True}}, cast_to=object),
    )
    with ThreadPoolExecutor() as threads:
        refused = [threads.submit(write) for write in writes]
        assert ask() == before
        for future in refused:
            with pytest.raises(openai.InternalServerError) as caught:
                future.result()
            assert (caught.value.status_code, caught.value.code) == (503, "catalog_busy")
            assert int(caught.value.response.headers["Retry-After"]) > 0
    assert ask() == before
    assert httpx.get(f"{server.url}/ready").json() == {"ready": True, "engine": True, "workers": True, "catalog": True}
    threading.Timer(1.0, other.rollback).start()
    late = server.upload(clips[2])
    assert late.status == "processed"
    server.client.files.delete(late.id)
    assert list((server.home / "tmp").glob("*/*")) == []


def test_a_video_in_parts_goes_on_after_a_broken_connection(server, clips):
    film = clips[3].read_bytes()
    size = {"bytes": len(film), "filename": "parts.mp4", "mime_type": "video/mp4"}
    upload = server.client.uploads.create(**size, purpose="vision")
    head = b'--b\r\nContent-Disposition: form-data; name="data"; filename="p"\r\n\r\n'
    where = httpx.URL(server.url)
    with socket.create_connection((where.host, where.port), timeout=30) as line:
        line.sendall(
            f"POST /v1/uploads/{upload.id}/parts HTTP/1.1\r\nHost: f2l\r\nContent-Length: {len(film) + 200}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode()
            + head
            + film[:1000]
        )
    parts = [server.client.uploads.parts.create(upload.id, data=piece).id for piece in (film[:1000], film[1000:])]
    assert not {*parts} & {file.id for file in server.client.files.list()}
    done = server.client.uploads.complete(upload.id, part_ids=parts)
    file = server.wait(done.file.id)
    assert (file.status, file.filename) == ("processed", "parts.mp4")
    assert server.client.files.content(file.id).read() == film
    answer = server.client.chat.completions.create(model=file.id, messages=QUESTION, max_tokens=4)
    assert answer.model_extra["f2l"]["videos"][0]["file_id"] == file.id
    with pytest.raises(openai.NotFoundError) as error:
        server.client.uploads.cancel("upload_" + "0" * 24)
    assert error.value.code == "upload_not_found"
    server.client.files.delete(file.id)


def test_the_stock_clients_upload_in_chunks(server, clips):
    whole = server.client.uploads.upload_file_chunked(
        file=clips[3], mime_type="video/mp4", purpose="user_data", part_size=2000
    )
    assert (whole.status, whole.file.bytes) == ("completed", clips[3].stat().st_size)
    server.client.files.delete(whole.file.id)
