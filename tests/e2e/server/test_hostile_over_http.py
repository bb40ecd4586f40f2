"""Uploads meant to do harm: each is a clear error or a video like any other, and leaves nothing behind."""

import os
import socket
import struct

import httpx
import openai
import pytest

from tests.support.videos import patch_header, write_audio, write_video

QUESTION = [{"role": "user", "content": "What is shown?"}]
GREEDY = {"temperature": 0, "max_tokens": 4}
BOUNDARY = "frontier"


@pytest.fixture(scope="module")
def ready(server, clips):
    return server.upload(clips[0])


@pytest.fixture(autouse=True)
def _nothing_is_lost_or_left(server, ready):
    def state():
        answer = server.client.chat.completions.create(model=ready.id, messages=QUESTION, **GREEDY)
        ids = {file.id for file in server.client.files.list()}
        kept = {path.name for path in (server.home / "videos").rglob("*") if path.is_file()}
        return answer.choices[0].message.content, ids, kept

    before = state()
    yield
    assert state() == before
    assert list((server.home / "tmp").glob("*/*")) == []


def box(kind, *content):
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def ftyp():
    return box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41")


def truncated_head(folder, clip):
    return clip.read_bytes()[:700]


def truncated_tail(folder, clip):
    return clip.read_bytes()[:-500]


def giant_moov(folder, clip):
    return ftyp() + struct.pack(">I4sQ", 1, b"moov", 1 << 60) + b"\0" * 1000


def deep_boxes(folder, clip):
    depth = 10_000
    headers = [struct.pack(">I4s", 8 * (depth - level), b"moov") for level in range(depth)]
    return ftyp() + b"".join(headers)


def huge_dimensions(folder, clip):
    path = folder / "huge.mp4"
    path.write_bytes(clip.read_bytes())
    patch_header(path, b"avc1", 24, struct.pack(">HH", 65535, 65535))
    return path.read_bytes()


def zero_rate(folder, clip):
    path = folder / "rate.mp4"
    path.write_bytes(clip.read_bytes())
    return patch_header(path, b"mdhd", 12, b"\0\0\0\0").read_bytes()


def no_frames(folder, clip):
    path = folder / "none.mp4"
    path.write_bytes(clip.read_bytes())
    return patch_header(path, b"stsz", 8, b"\0\0\0\0").read_bytes()


def wild_offsets(folder, clip):
    path = folder / "offsets.mp4"
    path.write_bytes(clip.read_bytes())
    return patch_header(path, b"stco", 8, b"\xff" * 4).read_bytes()


def negative_times(folder, clip):
    return write_video(folder / "negative.mkv", frames=5, times=[-9000, -5000, 0, 10, 20]).read_bytes()


def audio(folder, clip):
    return write_audio(folder / "audio.m4a").read_bytes()


def gif(folder, clip):
    return write_video(folder / "a.gif", frames=5, codec="gif", pixel_format="rgb8").read_bytes()


def webp(folder, clip):
    return b"RIFF\x24\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02" + b"\0" * 40


def png(folder, clip):
    return b"\x89PNG\r\n\x1a\n" + b"\0" * 100


def playlist(folder, clip):
    return b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


def concat(folder, clip):
    return b"ffconcat version 1.0\nfile /etc/passwd\n"


def archive(folder, clip):
    return b"PK\x03\x04" + b"\0" * 5000


UPLOADS = {
    "cut in the header": truncated_head,
    "a box of 2^60 bytes": giant_moov,
    "thousands of boxes in each other": deep_boxes,
    "audio only": audio,
    "a gif": gif,
    "an animated webp": webp,
    "a png": png,
    "a playlist of local files": playlist,
    "a list of local files": concat,
    "html": lambda folder, clip: b"<!doctype html><script>alert(1)</script>" * 50,
    "an archive": archive,
    "an executable": lambda folder, clip: b"\x7fELF" + os.urandom(3000),
    "random bytes": lambda folder, clip: b"\x00" + b"\xa5\x5a" * 5000,
    "one byte": lambda folder, clip: b"\0",
}


@pytest.mark.parametrize("kind", UPLOADS)
def test_a_file_that_is_refused(server, clips, tmp_path, kind):
    content = UPLOADS[kind](tmp_path, clips[1])
    with pytest.raises(openai.BadRequestError) as error:
        server.client.files.create(file=("video.mp4", content), purpose="vision")
    assert error.value.param == "file"
    assert error.value.code in ("not_a_video", "truncated_video", "no_video_stream")


SUSPECT = {
    "a header of 65535 x 65535 pixels": huge_dimensions,
    "a header of no frames": no_frames,
    "cut at its end": truncated_tail,
    "a time scale of zero": zero_rate,
    "offsets behind the end": wild_offsets,
    "negative times": negative_times,
}


@pytest.mark.parametrize("kind", SUSPECT)
def test_a_file_whose_header_passes_ends_one_way_or_the_other(server, clips, tmp_path, kind):
    """Refused at once, an error with its reason, or a video: never for ever in work."""
    client = server.client
    try:
        file = client.files.create(file=("video.mp4", SUSPECT[kind](tmp_path, clips[1])), purpose="vision")
    except openai.BadRequestError:
        return
    try:
        file = server.wait(file.id)
        assert file.status in ("processed", "error")
        assert file.status == "processed" or len(file.status_details) > 20
    finally:
        client.files.delete(file.id)


def test_ten_thousand_tiny_frames(server, tmp_path):
    path = write_video(tmp_path / "v.h264", frames=50, size=(16, 16), options={"preset": "ultrafast"})
    file = server.client.files.create(file=("v.h264", path.read_bytes() * 200), purpose="vision")
    try:
        file = server.wait(file.id)
        assert file.status == "processed"
        assert file.model_extra["f2l"]["frames"] < 100
    finally:
        server.client.files.delete(file.id)


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "..",
        "a\\..\\b",
        "视频 🎬.mp4",
        "x" * 2000,
        "con.mp4",
        '"; rm -rf',
        "a.exe",
    ],
)
def test_a_name_is_shown_and_never_opened(server, clips, tmp_path, name):
    file = server.client.files.create(file=(name, clips[1].read_bytes()), purpose="vision")
    try:
        assert len(file.filename) <= 1024
        found = server.client.files.content(file.id)
        assert found.read() == clips[1].read_bytes()
        assert "\n" not in found.response.headers["content-disposition"]
    finally:
        server.wait(file.id)
        server.client.files.delete(file.id)


def part(disposition, content=b"x"):
    return f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"


PURPOSE = part('form-data; name="purpose"', b"vision")
FILE = part('form-data; name="file"; filename="v.mp4"')
END = f"--{BOUNDARY}--\r\n".encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        END,
        PURPOSE + END,
        FILE + END,
        PURPOSE + FILE,  # without its end
        PURPOSE + part("form-data") + END,
        PURPOSE + part("nonsense; name=file") + END,
        PURPOSE + part('form-data; name="file"', b"not a file") + END,
        PURPOSE + FILE + FILE + END,
        PURPOSE * 50 + FILE + END,
        PURPOSE + part('form-data; name="x"', b"y" * (1 << 20)) + FILE + END,
        PURPOSE + b"--" + BOUNDARY.encode() + b"\r\n" + b"X" * 70_000 + b"\r\n",
        b"\xff" * 10_000,
    ],
)
def test_forms_that_are_none(server, body):
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    response = httpx.post(f"{server.url}/v1/files", content=body, headers=headers, timeout=60)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data", "multipart/mixed; boundary=x", "application/json", ""]
)
def test_bodies_that_are_no_form(server, kind):
    response = httpx.post(f"{server.url}/v1/files", content=PURPOSE + FILE + END, headers={"Content-Type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")


def test_a_client_that_goes_away_in_the_middle(server, clips):
    host, port = server.url.removeprefix("http://").split(":")
    body = PURPOSE + FILE.replace(b"x\r\n", clips[1].read_bytes())
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    for length in (f"Content-Length: {len(body) + 10_000}\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n10\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + length.encode() + body)


def test_a_chunked_body_is_counted_as_it_comes(server):
    """More than any cap this server has for a question, without saying so."""

    def body():
        yield b'{"model": "base", "messages": [{"role": "user", "content": "'
        for _ in range(140):
            yield b"x" * (1 << 20)

    try:
        url = f"{server.url}/v1/chat/completions"
        response = httpx.post(url, content=body(), headers={"Content-Type": "application/json"}, timeout=60)
    except httpx.WriteError:  # the connection was closed while the client still sent
        return
    assert response.status_code == 413
