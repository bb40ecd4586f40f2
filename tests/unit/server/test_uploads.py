"""Receiving an upload: straight to its place, once, hashed, and never more than the cap."""

import hashlib
import os
import tempfile

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from f2l_vllm.server.errors import APIError, answer
from f2l_vllm.server.videos.uploads import receive
from f2l_vllm.settings import Settings

CAP = 3_000_000
VISION = {"purpose": "vision"}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.fixture
def client(target, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(target.parent / "no such folder"))  # nothing may pass through there

    async def accept(request: Request) -> JSONResponse:
        upload = await receive(request, target, Settings(max_upload_bytes=CAP))
        return JSONResponse({"bytes": upload.bytes, "sha256": upload.sha256, "name": upload.filename})

    app = Starlette(routes=[Route("/", accept, methods=["POST"])], exception_handlers={APIError: answer})
    return TestClient(app)


def code(response):
    return response.status_code, response.json()["error"]["code"]


def test_the_bytes_and_their_hash(client, target):
    data = os.urandom(CAP)
    found = client.post("/", files={"file": ("v.mp4", data)}, data=VISION).json()
    assert found == {"bytes": CAP, "sha256": hashlib.sha256(data).hexdigest(), "name": "v.mp4"}
    assert target.read_bytes() == data


def test_the_cap_holds_for_the_file_and_for_the_body(client):
    assert code(client.post("/", files={"file": ("v", b"x" * (CAP + 1))}, data=VISION)) == (413, "file_too_large")

    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="v"\r\n\r\n'
        for _ in range(1000):
            yield b"x" * 100_000

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert code(client.post("/", content=endless(), headers=headers)) == (413, "file_too_large")
    assert code(client.post("/", content=b"x" * (2 * CAP), headers=headers)) == (413, "file_too_large")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"files": {"file": ("v", b"")}, "data": VISION}, "empty_file"),
        ({"files": {"other": ("v", b"x")}, "data": VISION}, "invalid_request"),
        ({"files": [("file", ("v", b"x")), ("file", ("w", b"y"))], "data": VISION}, "invalid_request"),
        ({"files": {"file": ("v", b"x")}, "data": {**VISION, "more": "y" * 100_000}}, "invalid_request"),
        ({"files": {"file": ("v", b"x")}, "data": {**VISION, **{f"f{i}": "y" for i in range(20)}}}, "invalid_request"),
        ({"files": {"file": ("v", b"x")}}, "invalid_purpose"),
        (
            {"files": {"file": ("v", b"x")}, "data": {**VISION, "expires_after[anchor]": "created_at"}},
            "invalid_expires_after",
        ),
        (
            {
                "files": {"file": ("v", b"x")},
                "data": {**VISION, "expires_after[anchor]": "created_at", "expires_after[seconds]": "9" * 5000},
            },
            "invalid_expires_after",
        ),
    ],
)
def test_forms_that_are_refused(client, form, expected):
    assert code(client.post("/", **form)) == (400, expected)


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a/../b.mp4", "a/../b.mp4"), ("", "video"), ("\x07\x1b[31mred", "[31mred"), ("x" * 2000, "x" * 1024)],
)
def test_names_that_can_be_shown(client, given, shown):
    part = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{given}"\r\n\r\nx\r\n'
    purpose = '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.post("/", content=(part + purpose).encode(), headers=headers).json()["name"] == shown
