"""`upload` sends many videos once each, whatever the server says on the way; before a server that stands for a real one
(tests/e2e/server/test_upload_over_http.py has that)."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import typer
from typer.testing import CliRunner

from f2l_vllm.cli import upload
from f2l_vllm.cli.main import app

PAGE = 100  # files in an answer to a list


class StandIn:
    """Keeps what it gets, unless `refusals` says what to answer first: a status, and a code.

    Once it has `hold_at` files it sets `held`, and keeps and answers nothing more until `go`.
    """

    def __init__(self):
        self.files, self.refusals, self.asked, self.lock = [], [], 0, threading.Lock()
        self.cut = 0  # bytes that get lost
        self.hold_at, self.held, self.go = float("inf"), threading.Event(), threading.Event()
        self.in_work, self.idle = 0, threading.Condition(self.lock)
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                after = parse_qs(urlsplit(self.path).query).get("after", [""])[0]
                first = next((place + 1 for place, file in enumerate(stand_in.files) if file["id"] == after), 0)
                page = stand_in.files[first : first + PAGE]
                more = first + PAGE < len(stand_in.files)
                self.answer(200, {"object": "list", "data": page, "has_more": more})

            def do_DELETE(self):
                name = self.path.rpartition("/")[2]
                stand_in.files = [file for file in stand_in.files if file["id"] != name]
                self.answer(200, {"id": name, "object": "file", "deleted": True})

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                body = self.rfile.read(length)
                if len(body) < length:
                    return  # the client has gone
                with stand_in.working():
                    self.take(body)

            def take(self, body):
                if len(stand_in.files) >= stand_in.hold_at:
                    stand_in.held.set()
                    stand_in.go.wait()
                with stand_in.lock:
                    stand_in.asked += 1
                    if stand_in.refusals:
                        status, code = stand_in.refusals.pop(0)
                        self.answer(status, {"error": {"message": "a sentence", "code": code}}, {"Retry-After": "0"})
                    else:
                        self.answer(200, stand_in.keep(body))

            def answer(self, status, value, headers=None):
                text = json.dumps(value).encode()
                self.send_response(status)
                for name, one in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, one)
                self.send_header("Content-Length", str(len(text)))
                with suppress(ConnectionError):  # the client has gone
                    self.end_headers()
                    self.wfile.write(text)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @contextmanager
    def working(self):
        with self.lock:
            self.in_work += 1
        try:
            yield
        finally:
            with self.idle:
                self.in_work -= 1
                self.idle.notify_all()

    def keep(self, body):
        """The file in a multipart body."""
        part = next(part for part in body.split(b"\r\n--") if b"filename=" in part)
        content = part.partition(b"\r\n\r\n")[2]
        content = content[: len(content) - self.cut]
        file = {"id": f"file-{len(self.files)}", "object": "file", "bytes": len(content), "created_at": 0}
        details = {"sha256": hashlib.sha256(content).hexdigest()}
        self.files.append({**file, "filename": "x", "purpose": "vision", "status": "uploaded", "f2l": details})
        return self.files[-1]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture
def videos(tmp_path):
    """Three contents in four files, and what is not to be sent."""
    folder = tmp_path / "videos"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    for name, text in {"a.mp4": "a", "b.MOV": "b", "deep/c.webm": "c", "deep/again.mp4": "a"}.items():
        (folder / name).write_text(text)
    for name in ("notes.txt", "deep/.hidden/x.mp4", "deep/.y.mp4"):
        (folder / name).write_text(name)
    return folder


def run(server, *words):
    done = CliRunner().invoke(app, ["upload", *map(str, words), "--url", server.url])
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()], " ".join(done.stderr.split())


def test_a_folder_a_pattern_and_files_name_each_video_once(videos):
    names = ["a.mp4", "b.MOV", "deep/again.mp4", "deep/c.webm"]
    assert upload.find([str(videos), str(videos / "a.mp4")]) == [videos / name for name in names]
    assert upload.find([f"{videos}/**/*.mp4"]) == [videos / "a.mp4", videos / "deep/again.mp4"]
    assert upload.find([str(videos / "notes.txt")]) == [videos / "notes.txt"]  # who names a file means it
    for nothing in (videos / "deep" / ".hidden" / "none", videos / "*.ogv"):
        with pytest.raises(typer.BadParameter, match="there is no video in"):
            upload.find([str(nothing)])


def test_the_same_bytes_are_sent_once_and_not_at_all_if_they_are_there(server, videos):
    code, rows, said = run(server, videos)
    assert code == 0
    assert said.endswith("4 videos: 3 sent, 0 failed, the others were there already")
    assert [row["path"] for row in rows] == [str(path) for path in upload.find([str(videos)])]
    ids = [row["id"] for row in rows]
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    assert rows[0]["sha256"] == hashlib.sha256(b"a").hexdigest()
    (videos / "new.mp4").write_text("new")
    code, again, said = run(server, videos)
    assert [row["id"] for row in again if "new" not in row["path"]] == ids
    assert "5 videos: 1 sent, 0 failed" in said
    assert server.asked == 4


@pytest.mark.parametrize("change", [{"status": "error"}, {"expires_at": 5}])
def test_a_file_that_failed_or_will_go_stands_for_nothing(server, videos, change):
    run(server, videos / "a.mp4")
    server.files[0].update(change)
    _, rows, _ = run(server, videos / "a.mp4")
    assert (server.asked, rows[0]["id"]) == (2, "file-1")


def test_a_full_queue_and_a_server_that_is_away_for_a_moment_are_waited_for(server, videos, monkeypatch):
    monkeypatch.setattr(upload, "_LONGEST_PAUSE", 0.01)
    server.refusals = [(429, "queue_full")] * 20 + [(503, "store_unavailable")] * (upload._TRIES - 1)
    code, rows, _ = run(server, videos / "a.mp4")
    assert (code, rows[0]["id"], server.asked) == (0, "file-0", 20 + upload._TRIES)


def test_each_failure_is_said_and_the_others_go_on(server, videos, monkeypatch):
    monkeypatch.setattr(upload, "_LONGEST_PAUSE", 0.01)
    server.refusals = [(400, "unsupported_codec"), *[(503, "catalog_busy")] * upload._TRIES]
    code, rows, said = run(server, videos, "--parallel", 1)
    assert code == 1
    codes = [row.get("error", {}).get("code") for row in rows]
    assert codes == ["unsupported_codec", "catalog_busy", "unsupported_codec", None]  # the third has the first's bytes
    assert f"{videos / 'a.mp4'}: unsupported_codec: a sentence" in said
    assert "4 videos: 1 sent, 3 failed" in said
    code, rows, _ = run(server, videos)
    assert (code, ["id" in row for row in rows]) == (0, [True] * 4)


def test_bytes_that_changed_on_the_way_are_noticed(server, videos):
    (videos / "a.mp4").write_text("more than a few bytes")
    server.cut = 3
    code, rows, said = run(server, videos / "a.mp4")
    assert (code, server.files) == (1, [])
    assert "it changed while it was sent" in said
    assert "id" not in rows[0]


def test_a_manifest_is_a_file_that_is_replaced_only_on_request(server, videos, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    assert run(server, videos, "-o", manifest)[:2] == (0, [])
    assert len(manifest.read_text().splitlines()) == 4
    code, _, said = run(server, videos, "-o", manifest)
    assert (code, "--overwrite" in said) == (2, True)
    assert run(server, videos, "-o", manifest, "--overwrite")[0] == 0


def test_a_server_that_is_not_there_is_said_before_anything_is_read(server, videos, monkeypatch):
    monkeypatch.setattr(upload, "_Sending", None)
    server.close()
    code, rows, said = run(server, videos)
    assert (code, rows) == (1, [])
    assert f"{server.url}: APIConnectionError" in said


def test_a_run_that_is_killed_goes_on_with_nothing_lost_or_doubled(server, tmp_path):
    """A real server would decode and read each of the thousands of videos; what counts here is what is sent to it."""
    folder, manifest = tmp_path / "videos", tmp_path / "manifest.jsonl"
    folder.mkdir()
    hashes = {}
    for number in range(2400):
        path, content = folder / f"{number:04}.mp4", b"video %d" % (number % 2200)
        path.write_bytes(content)
        hashes[str(path)] = hashlib.sha256(content).hexdigest()
    command = [sys.executable, "-m", "f2l_vllm.cli", "upload", str(folder), "--url", server.url, "-o", str(manifest)]
    server.hold_at = 900
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not server.held.wait(1):
            assert first.poll() is None, "it ended by itself"
    finally:
        first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not manifest.exists()
    server.hold_at = float("inf")
    server.go.set()
    with server.idle:  # what had arrived whole is kept, though nobody is there to be told
        server.idle.wait_for(lambda: server.in_work == 0)
    there = len(server.files)
    assert 900 < there < 2200
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"2400 videos: {2200 - there} sent, 0 failed" in " ".join(again.stderr.split())
    kept = Counter(file["f2l"]["sha256"] for file in server.files)
    assert kept.keys() == set(hashes.values())
    assert set(kept.values()) == {1}
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["path"] for row in rows] == sorted(hashes)
    ids = {file["id"]: file["f2l"]["sha256"] for file in server.files}
    assert all(ids[row["id"]] == row["sha256"] == hashes[row["path"]] for row in rows)
