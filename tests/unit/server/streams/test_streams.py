"""Live streams over a real catalog and store, with a client on the routes; this test is the worker."""

import io
import subprocess
import time
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from PIL import Image
from starlette.testclient import TestClient

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.streams import StreamEnded, TooManyStreams
from f2l_vllm.server.console import routes as console
from f2l_vllm.server.console.previews import Previews
from f2l_vllm.server.errors import APIError, answer, answer_validation
from f2l_vllm.server.streams import live, segments
from f2l_vllm.server.streams.routes import router
from f2l_vllm.server.streams.segments import Kind
from tests.support.catalog_steps import add
from tests.support.videos import write_video
from tests.unit.server.test_service import Bench

VALUES = {
    "name": "", "segment_seconds": 2.0, "window_seconds": 6.0, "keep_seconds": None, "idle_seconds": 60.0,
    "expires_seconds": None, "becomes_file": True, "source": None, "details": {"metadata": None},
}  # fmt: skip
SHAS = [str(digit) * 64 for digit in range(10)]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """HLS segments of two seconds as ffmpeg makes them: MPEG-TS, and fragments of MP4 with their header."""
    folder = tmp_path_factory.mktemp("film")
    whole = write_video(folder / "film.mp4", frames=40, fps=4, options={"g": "4", "bf": "0"})
    for kind in ("mpegts", "fmp4"):
        names = folder / ("s%d.ts" if kind == "mpegts" else "s%d.m4s")
        hls = ["-f", "hls", "-hls_time", "2", "-hls_list_size", "0", "-hls_segment_type", kind]
        command = ["ffmpeg", "-v", "error", "-i", whole, "-c", "copy", *hls, "-hls_segment_filename", names]
        subprocess.run([*command, folder / f"{kind}.m3u8"], check=True, cwd=folder)
    return folder


class Door:
    """A server's routes for streams; the key names the tenant."""

    def __init__(self, folder, **settings):
        @asynccontextmanager
        async def lifespan(app):
            self.bench = Bench(folder)
            service = app.state.f2l = self.bench.service
            service.settings = service.settings.model_copy(update=settings)
            self.streams = app.state.f2l_streams = live.LiveStreams(service)
            app.state.f2l_previews = Previews(service.settings)
            service.membership.appointed.set()
            yield
            self.streams.close()
            service.close()

        handlers = {APIError: answer, RequestValidationError: answer_validation}
        app = FastAPI(exception_handlers=handlers, lifespan=lifespan)
        app.include_router(router)
        app.include_router(console.router)

        @app.middleware("http")
        async def with_tenant(request, call_next):
            request.state.tenant = request.headers.get("authorization", "Bearer a").removeprefix("Bearer ")
            return await call_next(request)

        self.http = TestClient(app)

    def __enter__(self):
        self.http.__enter__()
        return self

    def __exit__(self, *failure):
        self.http.__exit__(*failure)

    def begin(self, **given):
        found = self.http.post("/v1/streams", json={"segment_seconds": 2, "window_seconds": 6, **given})
        assert found.status_code == 200, found.text
        return found.json()["id"]

    def put(self, stream, path, name=None):
        return self.http.put(f"/v1/streams/{stream}/push/{name or path.name}", content=path.read_bytes())

    def stream(self, stream):
        return self.http.get(f"/v1/streams/{stream}").json()

    def worked(self, stream, is_done, seconds=60.0):
        """The stream once `is_done` says so of it, with every job done and everything looked after meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.bench.work()
            self.http.portal.call(self.streams.look)
            if is_done(found := self.stream(stream)):
                return found
            time.sleep(0.02)
        raise AssertionError(self.stream(stream))


@pytest.fixture
def door(tmp_path):
    with Door(tmp_path) as door:
        yield door


def spans(stream):
    origin = stream["f2l"]["started_at"]
    return [[round(start - origin, 1), round(end - origin, 1)] for start, end in stream["f2l"]["covered"]]


def is_read(found):
    return found["f2l"]["pieces"] and not found["f2l"]["in_work"]


@pytest.mark.parametrize(("names", "first"), [("s{}.ts", None), ("s{}.m4s", "init.mp4")])
def test_segments_are_read_as_they_come_and_their_timestamps_place_them(door, film, names, first):
    stream = door.begin()
    if first:
        assert door.put(stream, film / first).json()["kind"] == "init"
    for number in (0, 2, 1, 3):
        assert door.put(stream, film / names.format(number)).status_code == 201
    found = door.worked(stream, is_read)
    assert spans(found) == [[0, 8]]
    assert (found["f2l"]["segments"], found["f2l"]["reading"]) == (4, "fine")


def test_a_stream_begins_with_its_first_segment_whichever_comes_first(door, film):
    stream = door.begin()
    starts = [door.put(stream, film / f"s{number}.ts").json()["start"] for number in (1, 0, 2)]
    found = door.worked(stream, is_read)
    assert found["f2l"]["started_at"] == min(starts) == starts[1]
    assert spans(found) == [[0, 6]]


def test_a_segment_that_is_put_again_is_not_read_again(door, film):
    stream = door.begin()
    places = [door.put(stream, film / "s0.ts").json() for _ in range(3)]
    assert [place["repeated"] for place in places] == [False, True, True]
    assert door.put(stream, film / "s0.ts", "another.ts").json()["repeated"]
    assert spans(door.worked(stream, is_read)) == [[0, 2]]


def test_a_sender_that_starts_again_goes_on_behind_what_is_there(door, film):
    stream = door.begin()
    for number in (0, 1):
        door.put(stream, film / f"s{number}.ts")
    later = film / "again.ts"
    later.write_bytes((film / "s0.ts").read_bytes() + bytes([0x47, 0x1F, 0xFF, 0x10]) + b"\xff" * 184)  # a null packet
    assert not door.put(stream, later).json()["repeated"]
    assert spans(door.worked(stream, is_read)) == [[0, 6]]


def test_a_gap_stays_a_gap(door, film):
    stream = door.begin()
    for number in (0, 3):
        door.put(stream, film / f"s{number}.ts")
    assert spans(door.worked(stream, is_read)) == [[0, 2], [6, 8]]


def test_the_timeline_has_the_place_and_the_state_of_each_piece(door, film):
    stream = door.begin()
    for number in (0, 1):
        door.put(stream, film / f"s{number}.ts")
    read = [[level, round(end - start), state] for level, start, end, state in door.stream(stream)["f2l"]["timeline"]]
    assert read == [[0, 2, "reading"], [0, 2, "reading"]]
    found = door.worked(stream, is_read)["f2l"]
    assert [state for *_, state in found["timeline"]] == ["ready", "ready"]
    assert [found["timeline"][0][1], found["timeline"][-1][2]] == found["covered"][0]


def test_the_picture_is_of_the_newest_segment_and_for_its_tenant(door, film, tmp_path):
    stream = door.begin()
    path = f"/console/streams/{stream}/picture"
    assert door.http.get(path).json()["error"]["code"] == "stream_is_empty"
    pictures = []
    for name in ("black.mp4", "white.mp4"):
        colour = f"color={name.removesuffix('.mp4')}:duration=2:rate=4"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", colour, "-pix_fmt", "yuv420p", tmp_path / name]
        subprocess.run(command, check=True)
        assert door.put(stream, tmp_path / name).status_code == 201
        pictures.append(Image.open(io.BytesIO(door.http.get(path).content)).convert("L").getextrema())
    assert pictures[0][1] < 20
    assert pictures[1][0] > 235
    other = door.http.get(path, headers={"authorization": "Bearer b"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "stream_not_found")


def test_a_stream_that_ends_becomes_a_file_with_its_segments_as_chapters(door, film, monkeypatch):
    monkeypatch.setattr(live, "LATE_SECONDS", 0.0)
    stream = door.begin(name="door")
    for number in range(5):
        door.put(stream, film / f"s{number}.ts")
    assert door.put(stream, film / "mpegts.m3u8").json()["kind"] == "playlist"
    found = door.worked(stream, lambda one: one["file_id"] and not one["f2l"]["pieces"])
    assert (found["status"], len(found["f2l"]["chapters"])) == ("ended", 5)
    (file,) = door.http.get("/v1/files").json()["data"]
    assert (file["id"], file["filename"], file["status"]) == (found["file_id"], "door.mp4", "processed")
    bytes_ = film / "whole.mp4"
    bytes_.write_bytes(door.http.get(f"/v1/files/{file['id']}/content").content)
    shown = subprocess.check_output(["ffprobe", "-v", "error", "-show_chapters", "-of", "csv", bytes_], text=True)
    assert shown.count("chapter,") == 5
    assert door.put(stream, film / "s0.ts").json()["error"]["code"] == "stream_ended"


def test_a_stream_that_is_not_kept_leaves_nothing(door, film, monkeypatch):
    monkeypatch.setattr(live, "LATE_SECONDS", 0.0)
    stream = door.begin(on_end="delete")
    door.put(stream, film / "s0.ts")
    door.http.post(f"/v1/streams/{stream}/end")
    found = door.worked(stream, lambda one: not one["f2l"]["pieces"])
    assert found["file_id"] is None
    assert door.http.get("/v1/files").json()["data"] == []


def test_a_deleted_stream_leaves_nothing_in_store_or_catalog(door, film):
    stream = door.begin()
    for number in range(5):
        door.put(stream, film / f"s{number}.ts")
    door.worked(stream, lambda one: is_read(one) and one["f2l"]["pieces"] > 5)
    assert door.http.delete(f"/v1/streams/{stream}").json()["deleted"]
    assert door.http.get(f"/v1/streams/{stream}").json()["error"]["code"] == "stream_not_found"
    until = time.monotonic() + 60  # a longer piece may have been on its way
    while door.bench.catalog.counts() != ({}, 0, 0) and time.monotonic() < until:
        door.http.portal.call(door.streams.look)
    assert door.bench.catalog.counts() == ({}, 0, 0)
    home = door.bench.store.home
    assert [path for folder in ("videos", "adapters") for path in (home / folder).rglob("*") if path.is_file()] == []


def test_old_segments_are_read_again_as_longer_pieces_in_the_background(door, film):
    stream = door.begin()
    for number in range(5):
        door.put(stream, film / f"s{number}.ts")
    found = door.worked(stream, lambda one: is_read(one) and one["f2l"]["pieces"] == 8)  # 5, two of 4 s, one of 8 s
    assert spans(found) == [[0, 10]]


def test_another_tenant_sees_no_stream(door, film):
    stream = door.begin()
    other = {"authorization": "Bearer b"}
    routes = [("GET", ""), ("DELETE", ""), ("POST", "/end"), ("GET", "/events"), ("PUT", "/push/s0.ts")]
    for method, path in routes:
        found = door.http.request(method, f"/v1/streams/{stream}{path}", headers=other)
        assert found.json()["error"]["code"] == "stream_not_found", (method, path)
    assert door.http.get("/v1/streams", headers=other).json()["data"] == []
    assert [one["id"] for one in door.http.get("/v1/streams").json()["data"]] == [stream]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "empty_file"),
        (b"nothing that is a video at all", "not_a_video"),
        (b"\x00\x00\x00\x18moof" + b"\0" * 16, "init_segment_missing"),
    ],
)
def test_what_is_no_segment_is_refused_and_leaves_nothing(door, body, code):
    stream = door.begin()
    found = door.http.put(f"/v1/streams/{stream}/push/s0.ts", content=body)
    assert found.json()["error"]["code"] == code
    assert door.stream(stream)["f2l"]["segments"] == 0
    assert [path for path in (door.bench.store.home / "tmp").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "given",
    [
        {"segment_seconds": 0},
        {"window_seconds": -1},
        {"unknown": 1},
        {"keep_seconds": 3},
        {"on_end": "keep"},
        {"expires_after": {"anchor": "created_at", "seconds": 5}},
    ],
)
def test_a_stream_that_makes_no_sense_is_refused(door, given):
    found = door.http.post("/v1/streams", json={"segment_seconds": 2, "window_seconds": 6, **given})
    assert found.status_code == 400
    assert door.http.get("/v1/streams").json()["data"] == []


@pytest.mark.parametrize(
    ("cut", "longest"),
    [
        ({"chunk_seconds": 2.0, "max_chunks": 2}, 4),
        ({"chunk_frames": 8, "max_chunks": 1, "fps": 2.0}, 4),
        ({"chunk_frames": 8, "max_chunks": 9}, 2),
    ],
)
def test_no_piece_is_longer_than_workers_that_cut_videos_into_chunks_read(tmp_path, film, cut, longest):
    with Door(tmp_path, **cut) as door:
        stream = door.begin()
        for number in range(5):
            door.put(stream, film / f"s{number}.ts")
        found = door.worked(stream, is_read)
        assert max(round(end - start) for _, start, end, _ in found["f2l"]["timeline"]) == longest


def test_a_stream_whose_file_cannot_be_read_stays(door, film, monkeypatch):
    monkeypatch.setattr(live, "LATE_SECONDS", 0.0)
    stream = door.begin()
    door.put(stream, film / "s0.ts")
    door.worked(stream, is_read)
    door.http.post(f"/v1/streams/{stream}/end")
    until = time.monotonic() + 60
    while not (found := door.bench.catalog.claim_jobs(1)) and time.monotonic() < until:
        door.http.portal.call(door.streams.look)
    door.bench.catalog.fail_job(found[0].adapter_name, "decode_failed", "no", token=found[0].token)
    for _ in range(3):
        door.http.portal.call(door.streams.look)
    kept = door.stream(stream)
    assert (kept["status"], kept["f2l"]["pieces"], spans(kept)) == ("ended", 1, [[0, 2]])


def test_a_tenant_has_so_many_live_streams(tmp_path):
    with Door(tmp_path, max_streams=1) as door:
        stream = door.begin()
        assert door.http.post("/v1/streams", json={}).json()["error"]["code"] == "too_many_streams"
        door.http.post(f"/v1/streams/{stream}/end")
        door.begin()


def test_events_tell_of_each_change_until_the_end(door, film, monkeypatch):
    monkeypatch.setattr(live, "LATE_SECONDS", 0.0)
    stream = door.begin(on_end="delete")
    door.put(stream, film / "s0.ts")
    door.http.post(f"/v1/streams/{stream}/end")
    door.worked(stream, lambda one: not one["f2l"]["pieces"])
    told = door.http.get(f"/v1/streams/{stream}/events").text.split("\n\n")
    assert '"status": "ended"' in told[0]
    assert told[1] == "data: [DONE]"


def test_a_stream_that_nothing_comes_from_ends(door, film):
    stream = door.begin(idle_seconds=10)
    record = door.http.portal.call(door.streams.find, stream, "a")
    door.bench.catalog.note_stream(record, received_at=door.bench.catalog.now() - 11)
    door.http.portal.call(door.streams.look)
    assert door.stream(stream)["status"] == "ended"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("s0.ts", Kind.SEGMENT),
        ("s0.m4s", Kind.FRAGMENT),
        ("init.mp4", Kind.INIT),
        ("fmp4.m3u8", Kind.PLAYLIST),
        ("film.mp4", Kind.SEGMENT),
    ],
)
def test_what_is_put_is_known_by_its_bytes(film, name, kind):
    assert segments.kind_of(film / name) is kind


def test_segments_that_two_servers_take_have_one_order(catalog: Catalog):
    stream = catalog.add_stream("a", VALUES, limit=1)
    with pytest.raises(TooManyStreams):
        catalog.add_stream("a", VALUES, limit=1)
    now = catalog.now()
    first, is_new = catalog.add_segment(stream, "0.ts", SHAS[0], 100.0, 2.0, now)
    assert is_new
    assert catalog.add_segment(stream, "0.ts", SHAS[0], 100.0, 2.0, now + 1) == (first, False)
    second, _ = catalog.add_segment(stream, "1.ts", SHAS[1], 102.0, 2.0, now + 2)
    assert (first.end, second.slot) == (second.start, 1)
    whole = catalog.add_piece(stream, 1, 0, [first, second], SHAS[2])
    assert catalog.add_piece(stream, 1, 0, [first, second], SHAS[2]) == whole
    assert whole.spans == ((first.start, second.end),)
    assert [piece.level for piece in catalog.pieces(stream.id)] == [0, 1, 0]
    ended = catalog.end_stream(stream)
    catalog.add_segment(ended, "2.ts", SHAS[3], 104.0, 2.0, now + 3)  # it was on its way
    with pytest.raises(StreamEnded):
        catalog.add_segment(ended, "3.ts", SHAS[4], 106.0, 2.0, now + 60)
    assert catalog.remove_stream(ended) == []
    assert catalog.pieces(stream.id) == []
    with pytest.raises(StreamEnded):
        catalog.add_segment(ended, "3.ts", SHAS[4], 106.0, 2.0, now)


def test_a_watch_has_one_answer_of_each_segment(catalog: Catalog):
    stream = catalog.add_stream("a", VALUES, limit=1)
    piece, _ = catalog.add_segment(stream, "0.ts", SHAS[0], 100.0, 2.0, catalog.now())
    watch = catalog.add_watch(stream, {"messages": []}, None, None, limit=1)
    with pytest.raises(TooManyStreams):
        catalog.add_watch(stream, {"messages": []}, None, None, limit=1)
    for text in ("first", "second"):
        catalog.add_watch_answer(watch, piece, text)
    assert [text for _, text in catalog.watch_answers(watch.id, 0, 10)] == ["first"]
    assert catalog.watches(stream.id)[0].asked_to == piece.end
    catalog.remove_watch(watch)
    assert catalog.watch_answers(watch.id, 0, 10) == []


def test_what_was_entered_for_a_stream_while_it_was_deleted_goes_too(catalog: Catalog):
    stream = catalog.add_stream("a", VALUES, limit=1)
    other = catalog.add_stream("b", VALUES, limit=1)
    for one in (stream, other):
        piece, _ = catalog.add_segment(one, "0.ts", SHAS[0], 100.0, 2.0, catalog.now())
    catalog.remove_stream(stream)
    for one in (stream, other):
        add(catalog, tenant=one.id)
    catalog.add_piece(stream, 1, 0, [piece], SHAS[1])
    add(catalog, tenant="a")
    catalog.drop_orphans()
    assert catalog.pieces(stream.id) == []
    assert len(catalog.pieces(other.id)) == 1
    listed = {
        name: catalog.files(name, after=None, limit=9, descending=False)[0] for name in (stream.id, other.id, "a")
    }
    assert [len(found) for found in listed.values()] == [0, 1, 1]
    assert catalog.drop_orphans() == []


def test_a_stream_that_ended_long_ago_is_forgotten_with_what_was_asked_of_it(catalog: Catalog):
    old, new, lives = (catalog.add_stream("a", VALUES, limit=9) for _ in range(3))
    piece, _ = catalog.add_segment(old, "0.ts", SHAS[0], 100.0, 2.0, catalog.now())
    watch = catalog.add_watch(old, {"messages": []}, None, None, limit=1)
    catalog.add_watch_answer(watch, piece, "text")
    for stream in (old, new):
        catalog.end_stream(stream)
    assert [one.id for one in catalog.live_streams("a")] == [lives.id]
    catalog.note_stream(old, ended_at=catalog.now() - 31 * 86400)
    assert catalog.purge_streams() == 1
    assert catalog.watch_answers(watch.id, 0, 9) == catalog.watches(old.id) == []
    assert [one.id for one in catalog.streams("a", after=None, limit=9)[0]] == [lives.id, new.id]
