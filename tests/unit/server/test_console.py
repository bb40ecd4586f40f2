"""The console's files and pictures, without a server; `tests/e2e/console` opens it in a browser."""

import asyncio
import gzip
import io
import re
import traceback

import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from f2l_vllm.server.app import F2LEndpointPlugin
from f2l_vllm.server.console.pages import FOLDER, Pages
from f2l_vllm.server.console.previews import POSTER, STRIP, STRIP_FRAMES, Previews
from f2l_vllm.server.console.routes import attach
from f2l_vllm.settings import Settings
from f2l_vllm.video.errors import VideoError
from tests.support import ROOT
from tests.support.videos import write_video


@pytest.fixture(scope="module")
def pages():
    return Pages()


@pytest.fixture
def browser(pages):
    app = FastAPI()
    attach(app, pages)
    return TestClient(app, follow_redirects=False)


def test_all_files_together_are_small():
    loaded = [path for path in FOLDER.rglob("*") if path.is_file() and not path.name.endswith("-licence.txt")]
    assert sum(path.stat().st_size for path in loaded) <= 150_000


def test_files_come_with_a_policy_that_lets_nothing_else_run(browser, pages):
    for path in pages.paths - {"/console"}:
        answer = browser.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
        assert "unsafe" not in policy
        assert "//" not in policy  # no other host
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_pages_name_no_other_host_and_hold_no_script():
    texts = {path: path.read_text() for path in FOLDER.rglob("*") if path.suffix in (".js", ".html", ".css")}
    for path, text in texts.items():
        code = re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)
        assert not re.search(r"https?://|innerHTML|dangerously|\beval\(", code), path
    assert "style=" not in texts[FOLDER / "index.html"]
    scripts = re.findall(r"<script(.*?)>(.*?)</script>", texts[FOLDER / "index.html"])
    assert scripts == [(' type="module" src="app.js"', "")]


def test_a_file_that_has_not_changed_is_not_sent_again(browser):
    first = browser.get("/console/app.js")
    again = browser.get("/console/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_who_takes_nothing_compressed_gets_it_plain(browser):
    packed = browser.get("/console/vendor/preact.js")
    plain = browser.get("/console/vendor/preact.js", headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content == gzip.decompress((FOLDER / "vendor" / "preact.js.gz").read_bytes())


def test_the_page_is_found_without_its_slash_behind_any_prefix(browser):
    answer = browser.get("/console")
    assert (answer.status_code, answer.headers["location"]) == (307, "console/")


@pytest.mark.parametrize("given", ["1", "0"])
def test_an_operator_may_leave_it_out(monkeypatch, given):
    monkeypatch.setenv("F2L_CONSOLE", given)
    app = FastAPI()
    F2LEndpointPlugin().attach_router(app)
    paths = {getattr(route, "path", "") for route in app.router.routes}
    own = {path for path in paths if path.startswith("/console")}
    assert "/v1/files" in paths
    assert own >= {"/console", "/console/app.js", "/console/events"} if given == "1" else own == set()


def test_every_code_of_the_errors_has_a_headline():
    tables = "\n".join(line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if line.startswith("|"))
    codes = set(re.findall(r"`([a-z]+_[a-z_]+)`", tables)) - {"user_data"}
    known = set(re.findall(r"^  ([a-z_]+): ", (FOLDER / "errors.js").read_text(), re.MULTILINE))
    assert len(codes) > 60
    assert codes <= known


def make(previews, kind, path, seconds=(), video="v"):
    return asyncio.run(previews.make(video, kind, path, seconds, "t"))


def test_a_strip_shows_the_frames_that_were_read(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=40, fps=10, size=(128, 64))
    strip = make(Previews(Settings()), STRIP, path, tuple(place / 10 for place in range(40)))
    assert (strip.seconds[0], strip.seconds[-1], len(strip.seconds)) == (0.0, 3.9, STRIP_FRAMES)
    picture = Image.open(io.BytesIO(strip.picture)).convert("RGBA")
    assert picture.width / picture.height == pytest.approx(2 * STRIP_FRAMES, rel=0.02)
    gaps = [column for column in range(picture.width) if picture.getpixel((column, 9))[3] == 0]
    assert len(gaps) == 3 * (STRIP_FRAMES - 1)


def test_pictures_are_made_once_and_forgotten_with_their_video(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    previews = Previews(Settings())
    made = make(previews, POSTER, path)
    path.unlink()
    assert make(previews, POSTER, path) is made
    assert previews.names() == ["v"]
    previews.forget("v")
    assert previews.names() == []
    with pytest.raises(FileNotFoundError):
        make(previews, POSTER, path)


def test_a_video_that_cannot_be_decoded_is_tried_once(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video")
    previews = Previews(Settings())
    with pytest.raises(VideoError) as first:
        make(previews, POSTER, path)
    monkeypatch.setattr(previews, "_make", None)
    depths = []
    for _ in range(3):
        with pytest.raises(VideoError) as again:
            make(previews, POSTER, path)
        assert (again.value.code, again.value.message) == (first.value.code, first.value.message)
        depths.append(len(list(traceback.walk_tb(again.value.__traceback__))))
    assert len(set(depths)) == 1  # one error raised again and again would hold ever more frames


def test_no_more_is_kept_than_there_is_room_for(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4")
    previews = Previews(Settings())
    size = len(make(previews, POSTER, path).picture) + 512
    monkeypatch.setattr("f2l_vllm.server.console.previews._KEPT_BYTES", 2 * size)
    for name in "abc":
        make(previews, POSTER, path, video=name)
    assert previews.names() == ["b", "c"]
