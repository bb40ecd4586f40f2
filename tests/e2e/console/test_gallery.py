"""The list of videos, in a browser."""

import base64
import io
import json
import re
import tarfile
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
from playwright.sync_api import expect
from sqlalchemy import create_engine, delete, insert, select

from f2l_vllm.catalog.tables import files
from tests.e2e.console.conftest import KEY, OTHER_KEY
from tests.support.videos import write_video

HOSTILE = "<img src=x onerror='window.hacked=1'>.mp4"
MANY = 10_000


def row(page, name):
    return page.locator(".row", has_text=name)


def test_a_hostile_name_is_text(host, page, films):
    file = host.client.files.create(file=(HOSTILE, films[1].read_bytes() + b"\1"), purpose="vision")
    expect(row(page, HOSTILE)).to_be_visible()
    page.goto(f"{host.url}/console/#/ask/{file.id}")
    expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


def test_a_video_goes_through_its_stages_and_shows_its_frames(page, tmp_path):
    options = {"preset": "ultrafast", "g": "100000"}  # one key frame: every frame has to be decoded
    slow = write_video(tmp_path / "slow.mp4", frames=330, fps=30, size=(1920, 1080), options=options)
    page.locator("input[type=file]").set_input_files(slow)
    bar = page.get_by_role("progressbar", name="Reading slow.mp4")
    expect(bar).to_be_visible()
    expect(bar).to_have_attribute("aria-valuetext", re.compile("^(decoding|reading), "))
    expect(bar.locator("span")).to_have_text(["uploaded", "decoding", "reading", "writing", "ready"])
    expect(bar.locator("span.is-done").first).to_have_text("uploaded")
    mine = row(page, "slow.mp4")
    expect(mine.locator(".strip img")).to_be_visible(timeout=120_000)
    expect(mine.locator(".poster img")).to_be_visible()
    width = mine.locator(".strip img").evaluate("image => image.naturalWidth / image.naturalHeight")
    assert width > 3  # several frames


def test_what_is_no_video_is_said_in_a_sentence(page):
    page.locator("input[type=file]").set_input_files({"name": "a.mp4", "mimeType": "video/mp4", "buffer": b"no video"})
    mine = row(page, "a.mp4")
    expect(mine.get_by_role("alert")).to_contain_text("This is not a video.")
    mine.get_by_role("button", name="Dismiss a.mp4").click()
    expect(mine).to_have_count(0)


def test_several_videos_dropped_anywhere_are_kept_as_long_as_was_chosen(host, page, films):
    page.get_by_label("How long new videos are kept").select_option("Keep for a day")
    names = ["dropped-1.mp4", "dropped-2.mp4"]
    contents = [base64.b64encode(films[1].read_bytes() + name.encode()).decode() for name in names]
    page.evaluate(
        """([names, contents]) => {
            const dataTransfer = new DataTransfer();
            names.forEach((name, at) => {
                const bytes = Uint8Array.from(atob(contents[at]), (one) => one.charCodeAt(0));
                dataTransfer.items.add(new File([bytes], name, { type: "video/mp4" }));
            });
            const send = (type) => document.body.dispatchEvent(
                new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }));
            send("dragover");
            send("drop");
        }""",
        [names, contents],
    )
    for name in names:
        expect(row(page, name).locator(".strip img")).to_be_visible()
        expect(row(page, name)).to_contain_text("gone in 24 h")
    for file in [one for one in host.client.files.list() if one.filename in names]:
        assert file.expires_at - file.created_at == 86400
        host.client.files.delete(file.id)


def test_pin_expiry_download_and_delete(host, page, films):
    page.get_by_label("How long new videos are kept").select_option("Keep for an hour")
    video = {"name": "mine.mp4", "mimeType": "video/mp4", "buffer": films[1].read_bytes() + b"\2"}
    page.locator("input[type=file]").set_input_files(video)
    mine = row(page, "mine.mp4")
    expect(mine).to_contain_text("gone in 60 min")
    mine.get_by_role("button", name="Pin mine.mp4", exact=True).click()
    expect(mine).to_contain_text("pinned")
    (file,) = [one for one in host.client.files.list() if one.filename == "mine.mp4"]
    assert file.f2l["pinned"]
    with page.expect_download() as download:
        mine.get_by_role("button", name="Download the adapter of mine.mp4").click()
    with tarfile.open(fileobj=io.BytesIO(download.value.path().read_bytes())) as archive:
        assert any(name.endswith("adapter_config.json") for name in archive.getnames())
    mine.get_by_role("button", name="Delete mine.mp4").click()
    page.get_by_role("button", name="Cancel").click()
    mine.get_by_role("button", name="Delete mine.mp4").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(mine).to_have_count(0)
    assert all(one.id != file.id for one in host.client.files.list())


def test_what_others_upload_and_delete_shows_by_itself(host, page, films):
    expect(page.locator(".bar")).to_be_visible()
    file = host.client.files.create(file=("theirs.mp4", films[1].read_bytes() + b"\3"), purpose="vision")
    expect(row(page, "theirs.mp4").locator(".strip img")).to_be_visible()
    host.client.files.delete(file.id)


def test_the_questions_of_a_batch_are_not_among_the_videos(host, page, films):
    files = [host.client.files.create(file=("questions.jsonl", b"{}"), purpose="batch")]
    files.append(host.client.files.create(file=("beside.mp4", films[1].read_bytes() + b"\4"), purpose="vision"))
    for _ in range(2):
        expect(row(page, "beside.mp4")).to_be_visible()
        expect(row(page, "questions.jsonl")).to_have_count(0)
        page.reload()
    for file in files:
        host.client.files.delete(file.id)


@pytest.fixture
def site(films, tmp_path):
    """The address of a film on another server."""
    (tmp_path / "a.mp4").write_bytes(films[1].read_bytes() + b"\6")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.mp4"
        server.shutdown()


def test_a_link_is_fetched_where_a_host_is_allowed(host, page, site):
    link, fetch = page.get_by_label("Link to a video from 127.0.0.1"), page.get_by_role("button", name="Fetch")
    link.fill("https://other.example.com/a.mp4")
    fetch.click()
    refused = row(page, "https://other.example.com/a.mp4")
    expect(refused.get_by_role("alert")).to_contain_text("The operator does not allow this host.")
    link.fill(site)
    fetch.click()
    mine = row(page, "a.mp4").filter(has=page.locator(".strip img"))
    expect(mine).to_be_visible()
    for file in host.client.files.list():
        if file.filename == "a.mp4":
            host.client.files.delete(file.id)


@pytest.fixture
def many(host, film):
    """10,000 more files in the catalog, all with one adapter."""
    engine = create_engine(f"sqlite:///{host.server.home / 'catalog.sqlite3'}", connect_args={"timeout": 30})
    with engine.begin() as connection:
        like = dict(connection.execute(select(files).where(files.c.id == film)).mappings().one())
        del like["number"]
        made = {"created_at": time.time() - 86400}
        rows = [{**like, **made, "id": f"file-{n:032x}", "filename": f"many-{n:05}.mp4"} for n in range(MANY)]
        connection.execute(insert(files), rows)
    yield
    with engine.begin() as connection:
        connection.execute(delete(files).where(files.c.filename.like("many-%")))
    engine.dispose()


def test_ten_thousand_videos_are_a_few_rows(many, visit, host):
    page = visit.page
    page.goto(f"{host.url}/console")
    expect(page.get_by_text(f"many-{MANY - 1:05}.mp4")).to_be_visible()
    last = page.get_by_text("many-00000.mp4", exact=True)
    for _ in range(200):
        if last.is_visible():
            break
        page.evaluate("document.querySelector('main').scrollTo(0, 1e9)")
        page.wait_for_timeout(100)
    expect(last).to_be_visible()
    assert page.locator(".row").count() < 40
    lists = [path for method, path in visit.requests if path == "/v1/files" and method == "GET"]
    assert 20 <= len(lists) <= 22  # 500 at a time
    pictures = [path for _, path in visit.requests if path.endswith(("/poster", "/strip"))]
    assert len(pictures) < 400  # not of the rows that were scrolled past
    page.get_by_role("searchbox").fill("many-04321")
    expect(page.get_by_text("1 found")).to_be_visible()
    expect(page.get_by_text("many-04321.mp4", exact=True)).to_be_visible()


def test_pictures_and_events_are_the_tenants_own(host, film):
    def get(path, key):
        return httpx.get(f"{host.url}/console/{path}", headers={"Authorization": f"Bearer {key}"}, timeout=30)

    for path in (f"files/{film}/poster", f"files/{film}/strip"):
        mine = get(path, KEY)
        assert (mine.status_code, mine.headers["content-type"]) == (200, "image/webp")
        assert mine.headers["cache-control"] == "private, no-store"
        assert get(path, OTHER_KEY).json()["error"]["code"] == "video_not_found"
        assert get(path, "no-key").status_code == 401
    assert get("about", "no-key").status_code == 401
    assert get("events", "no-key").status_code == 401


def test_events_tell_of_the_callers_files_alone(host, films):
    def events(key):
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("GET", f"{host.url}/console/events", headers=headers, timeout=30) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    mine, theirs = events(KEY), events(OTHER_KEY)
    assert next(mine)["files"] == next(theirs)["files"] == []
    file = host.client.files.create(file=("seen.mp4", films[1].read_bytes() + b"\4"), purpose="vision")
    seen = [one["id"] for one in next(mine)["files"]]
    assert seen == [file.id]
    other = httpx.post(
        f"{host.url}/v1/files",
        headers={"Authorization": f"Bearer {OTHER_KEY}"},
        data={"purpose": "vision"},
        files={"file": ("other.mp4", films[2].read_bytes())},
        timeout=30,
    ).json()
    assert [one["id"] for one in next(theirs)["files"]] == [other["id"]]
    for stream in (mine, theirs):
        stream.close()
