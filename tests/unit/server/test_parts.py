"""Videos in parts, over a real store and catalog, with the stock client on the routes."""

import hashlib
import os
from contextlib import asynccontextmanager

import openai
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from openai import OpenAI
from sqlalchemy import update
from starlette.testclient import TestClient

from f2l_vllm.catalog.upload_tables import LASTING_SECONDS, uploads
from f2l_vllm.server.errors import APIError, answer, answer_validation
from f2l_vllm.server.videos import parts
from f2l_vllm.server.videos.part_routes import router
from tests.support.videos import write_video
from tests.unit.server.test_service import Bench


class Door:
    """A server's routes for files and uploads; the key names the tenant."""

    def __init__(self, folder, shared=None, **settings):
        @asynccontextmanager
        async def lifespan(app):
            self.bench = Bench(folder, **shared or {})
            self.service = app.state.f2l = self.bench.service
            self.service.settings = self.service.settings.model_copy(update=settings)
            yield
            self.service.close()

        handlers = {APIError: answer, RequestValidationError: answer_validation}
        app = FastAPI(exception_handlers=handlers, lifespan=lifespan)
        app.include_router(router)

        @app.middleware("http")
        async def with_tenant(request, call_next):
            request.state.tenant = request.headers["authorization"].removeprefix("Bearer ")
            return await call_next(request)

        self.http = TestClient(app)

    def __enter__(self):
        self.http.__enter__()
        return self

    def __exit__(self, *failure):
        self.http.__exit__(*failure)

    def client(self, tenant="a"):
        base = "http://testserver/v1"
        return OpenAI(base_url=base, api_key=tenant, max_retries=0, http_client=self.http)


@pytest.fixture
def film(tmp_path):
    return write_video(tmp_path / "film.mp4", frames=12, fps=6, size=(64, 48)).read_bytes()


@pytest.fixture
def door(tmp_path):
    with Door(tmp_path / "server") as door:
        yield door


def begin(client, size, **options):
    return client.uploads.create(bytes=size, filename="film.mp4", mime_type="video/mp4", purpose="vision", **options)


def in_thirds(client, upload, film):
    third = len(film) // 3
    pieces = (film[:third], film[third : 2 * third], film[2 * third :])
    return [client.uploads.parts.create(upload.id, data=piece).id for piece in pieces]


def left_over(door, upload):
    """The parts of an upload, after it was seen that nothing but what the catalog names is in the store."""
    catalog, store = door.service.catalog, door.service.store
    parts, _ = catalog.files(upload.id, after=None, limit=99, descending=False)
    assert catalog.stored_bytes(upload.id) == sum(part.bytes for part in parts)
    assert all(store.has_video(part.video) for part in parts)
    stored = {path.name for path in (door.service.settings.data_folder / "videos").rglob("*") if path.is_file()}
    assert catalog.named(stored) == stored
    return sorted(part.id for part in parts)


def refusal(call):
    with pytest.raises(openai.APIStatusError) as error:
        call()
    return error.value.status_code, error.value.code


def test_a_video_in_parts_is_the_file_that_it_would_be_in_one_piece(door, film):
    client = door.client()
    upload = begin(client, len(film), expires_after={"anchor": "created_at", "seconds": 7200})
    assert (upload.object, upload.status, upload.bytes, upload.file) == ("upload", "pending", len(film), None)
    assert upload.expires_at - upload.created_at == 3600
    ids = in_thirds(client, upload, film)
    done = client.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(film).hexdigest())
    assert (done.status, done.file.filename, done.file.bytes, done.file.purpose) == (
        "completed",
        "film.mp4",
        len(film),
        "vision",
    )
    assert done.file.expires_at - done.file.created_at == 7200
    assert client.files.content(done.file.id).read() == film
    assert left_over(door, upload) == []
    assert client.uploads.complete(upload.id, part_ids=ids).file.id == done.file.id  # the first answer was lost, say
    assert refusal(lambda: in_thirds(client, upload, film)) == (400, "upload_not_pending")


def test_requests_of_a_batch_come_in_parts_too(door):
    client, requests = door.client(), b'{"custom_id": "one"}\n' * 9
    given = {"filename": "q.jsonl", "mime_type": "text/jsonl", "purpose": "batch"}
    assert refusal(lambda: client.uploads.create(bytes=200_000_001, **given)) == (413, "file_too_large")
    upload = client.uploads.create(bytes=len(requests), **given)
    done = client.uploads.complete(upload.id, part_ids=in_thirds(client, upload, requests))
    assert (done.file.purpose, done.file.status) == ("batch", "processed")
    assert client.files.content(done.file.id).read() == requests


def test_the_clients_own_way_in_chunks(door, film, tmp_path):
    done = door.client().uploads.upload_file_chunked(
        file=tmp_path / "film.mp4", mime_type="video/mp4", purpose="vision", part_size=1000
    )
    assert (done.status, done.file.bytes) == ("completed", len(film))


def test_a_part_that_is_sent_again_or_in_another_order_is_the_same(door, film):
    client = door.client()
    upload = begin(client, len(film))
    ids = in_thirds(client, upload, film)
    assert in_thirds(client, upload, film) == ids
    assert len(left_over(door, upload)) == 3
    assert refusal(lambda: client.uploads.complete(upload.id, part_ids=ids[:2])) == (400, "incomplete_upload")
    assert refusal(lambda: client.uploads.complete(upload.id, part_ids=[*ids[:2], "part_0"])) == (
        400,
        "invalid_request",
    )
    wrong = hashlib.md5(b"other").hexdigest()
    assert refusal(lambda: client.uploads.complete(upload.id, part_ids=ids, md5=wrong)) == (400, "checksum_mismatch")
    assert refusal(lambda: client.uploads.complete(upload.id, part_ids=ids[::-1]))[0] == 400  # no video
    assert client.uploads.complete(upload.id, part_ids=ids).status == "completed"


def test_a_restart_loses_nothing(film, tmp_path):
    with Door(tmp_path / "server") as door:
        upload = begin(door.client(), len(film))
        ids = in_thirds(door.client(), upload, film)[:2]  # the last answer did not come through
    with Door(tmp_path / "server") as door:
        client = door.client()
        ids.append(client.uploads.parts.create(upload.id, data=film[2 * (len(film) // 3) :]).id)
        done = client.uploads.complete(upload.id, part_ids=ids)
        assert client.files.content(done.file.id).read() == film


def test_a_connection_that_breaks_leaves_no_part(door, film):
    client = door.client()
    upload = begin(client, len(film))

    def broken():
        yield b'--b\r\nContent-Disposition: form-data; name="data"; filename="v"\r\n\r\n'
        yield film[:100]

    headers = {"Content-Type": "multipart/form-data; boundary=b", "Authorization": "Bearer a"}
    response = door.http.post(f"/v1/uploads/{upload.id}/parts", content=broken(), headers=headers)
    assert response.status_code == 400
    assert left_over(door, upload) == []
    assert not list(door.service.settings.data_folder.glob("tmp/*/*"))
    ids = in_thirds(client, upload, film)
    assert client.uploads.complete(upload.id, part_ids=ids).status == "completed"


def test_an_upload_is_its_tenants_own(door, film):
    client, other = door.client("a"), door.client("b")
    upload = begin(client, len(film))
    ids = in_thirds(client, upload, film)
    missing = (404, "upload_not_found")
    assert refusal(lambda: other.uploads.parts.create(upload.id, data=b"x")) == missing
    assert refusal(lambda: other.uploads.complete(upload.id, part_ids=ids)) == missing
    assert refusal(lambda: other.uploads.cancel(upload.id)) == missing
    for wrong in ("upload_0", "upload_" + "0" * 24, "..%2F..", "upload_" + "0" * 21 + "%2F.."):
        assert refusal(lambda wrong=wrong: client.uploads.cancel(wrong))[0] == 404


def test_a_cancelled_one_leaves_nothing(door, film):
    client = door.client()
    upload = begin(client, len(film))
    in_thirds(client, upload, film)
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert left_over(door, upload) == []
    for call in (
        lambda: client.uploads.parts.create(upload.id, data=b"x"),
        lambda: client.uploads.complete(upload.id, part_ids=["part_0"]),
        lambda: client.uploads.cancel(upload.id),
    ):
        assert refusal(call) == (400, "upload_not_pending")


def test_an_abandoned_one_is_gone_after_its_hour(door, film, monkeypatch):
    client, catalog = door.client(), door.service.catalog
    upload = begin(client, len(film))
    in_thirds(client, upload, film)
    now = catalog.now
    monkeypatch.setattr(catalog, "now", lambda: now() + LASTING_SECONDS)
    assert refusal(lambda: client.uploads.parts.create(upload.id, data=b"x")) == (404, "upload_not_found")
    assert len(catalog.expire_files(catalog.now())) == 0  # it may be completed at this moment
    with catalog._write() as connection:
        connection.execute(update(uploads).values(created_at=uploads.c.created_at - LASTING_SECONDS - 601))
    assert catalog.purge_uploads() == 1
    assert len(catalog.expire_files(catalog.now() + 601)) == 3
    assert catalog.tombstones(9)  # their bytes are to be removed


def test_parts_are_no_files_of_their_tenant(door, film):
    client = door.client()
    upload = begin(client, len(film))
    (part, *_) = in_thirds(client, upload, film)
    assert list(client.files.list()) == []
    assert refusal(lambda: client.files.retrieve(part)) == (404, "video_not_found")
    assert refusal(lambda: client.files.delete(part)) == (404, "video_not_found")
    assert door.service.catalog.stored_bytes("a") == 0


def test_any_server_takes_a_part_and_completes(film, tmp_path, database_url):
    shared = {"database": database_url, "url": f"file://{tmp_path / 'store'}"}
    with Door(tmp_path / "one", shared) as one, Door(tmp_path / "two", shared) as two:
        upload = begin(one.client(), len(film))
        third = len(film) // 3
        ids = [
            door.client().uploads.parts.create(upload.id, data=piece).id
            for door, piece in ((one, film[:third]), (two, film[third : 2 * third]), (one, film[2 * third :]))
        ]
        assert refusal(lambda: two.client("b").uploads.complete(upload.id, part_ids=ids)) == (404, "upload_not_found")
        done = two.client().uploads.complete(upload.id, part_ids=ids)
        assert one.client().files.content(done.file.id).read() == film
        assert one.client().uploads.complete(upload.id, part_ids=ids).file.id == done.file.id
        assert one.service.catalog.stored_bytes(upload.id) == 0
        left = begin(two.client(), len(film))
        two.client().uploads.parts.create(left.id, data=film[:third])
        assert one.client().uploads.cancel(left.id).status == "cancelled"
        assert refusal(lambda: two.client().uploads.parts.create(left.id, data=b"x")) == (400, "upload_not_pending")
        assert one.service.catalog.stored_bytes(left.id) == 0


@pytest.fixture
def pair(tmp_path, film):
    """Two servers of one catalog and one store, an upload whose parts are there, and the ids of the parts."""
    shared = {"database": f"sqlite:///{tmp_path / 'catalog'}", "url": f"file://{tmp_path / 'store'}"}
    with Door(tmp_path / "one", shared) as one, Door(tmp_path / "two", shared) as two:
        upload = begin(one.client(), len(film))
        yield one, two, upload, in_thirds(one.client(), upload, film)
        assert one.service.catalog.stored_bytes(upload.id) == 0


def meanwhile(monkeypatch, owner, name, action):
    """Have something happen elsewhere right before a method goes on."""
    method = getattr(owner, name)

    async def late(*args):
        action()
        return await method(*args)

    monkeypatch.setattr(owner, name, late)


def test_one_that_another_server_completes_at_the_same_time_is_one_file(pair, monkeypatch):
    one, two, upload, ids = pair
    done = []
    complete = one.client().uploads.complete
    meanwhile(monkeypatch, two.service.parts, "join", lambda: done.append(complete(upload.id, part_ids=ids)))
    assert two.client().uploads.complete(upload.id, part_ids=ids).file.id == done[0].file.id
    assert [file.id for file in two.client().files.list()] == [done[0].file.id]


def test_one_that_another_server_cancels_while_it_is_completed_is_no_file(pair, monkeypatch):
    one, two, upload, ids = pair
    meanwhile(monkeypatch, two.service, "enter", lambda: one.client().uploads.cancel(upload.id))
    assert refusal(lambda: two.client().uploads.complete(upload.id, part_ids=ids)) == (400, "upload_not_pending")
    assert list(one.client().files.list()) == []


def test_one_that_another_server_completes_is_not_cancelled(pair, monkeypatch):
    one, two, upload, ids = pair
    complete = one.client().uploads.complete
    meanwhile(monkeypatch, two.service.parts, "end", lambda: complete(upload.id, part_ids=ids))
    assert refusal(lambda: two.client().uploads.cancel(upload.id)) == (400, "upload_not_pending")
    assert len(list(one.client().files.list())) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bytes": 0}, (400, "invalid_request")),
        ({"bytes": 20_001}, (413, "file_too_large")),
        ({"purpose": "batch_output"}, (400, "invalid_purpose")),
        ({"expires_after": {"anchor": "created_at", "seconds": 5}}, (400, "invalid_expires_after")),
    ],
)
def test_what_cannot_be_begun(tmp_path, options, expected):
    given = {"bytes": 10, "filename": "v.mp4", "mime_type": "video/mp4", "purpose": "vision", **options}
    with Door(tmp_path / "server", max_upload_bytes=20_000) as door:
        assert refusal(lambda: door.client().uploads.create(**given)) == expected


def test_limits_hold_before_and_while_bytes_come(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_AT_ONCE", 2)
    with Door(tmp_path / "server", tenant_bytes=1000) as door:
        client = door.client()
        first = begin(client, 600)
        assert refusal(lambda: begin(client, 401)) == (403, "storage_quota_exceeded")
        second = begin(client, 300)
        assert refusal(lambda: begin(client, 1)) == (429, "too_many_uploads")
        assert begin(door.client("b"), 1000).status == "pending"
        client.uploads.cancel(second.id)
        begin(client, 400)
        create = client.uploads.parts.create
        assert refusal(lambda: create(first.id, data=os.urandom(601))) == (413, "file_too_large")
        create(first.id, data=os.urandom(400))
        assert refusal(lambda: create(first.id, data=os.urandom(201))) == (413, "file_too_large")
        assert refusal(lambda: create(first.id, data=b"")) == (400, "empty_file")
        assert len(left_over(door, first)) == 1
