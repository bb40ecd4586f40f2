"""Every kind of bad input is a clear OpenAI error, and the next question is answered as if nothing had been."""

import httpx
import openai
import pytest

from tests.support.videos import write_audio, write_video

QUESTION = [{"role": "user", "content": "What is shown?"}]
ANSWER = {"temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def ready(server, clips):
    return server.upload(clips[0])


@pytest.fixture(autouse=True)
def _the_server_is_as_before(server, ready):
    ask = server.client.chat.completions.create
    before = ask(model=ready.id, messages=QUESTION, **ANSWER)
    files = {file.id for file in server.client.files.list()}
    yield
    after = ask(model=ready.id, messages=QUESTION, **ANSWER)
    assert after.choices[0].message.content == before.choices[0].message.content
    assert {file.id for file in server.client.files.list()} == files
    assert list((server.home / "tmp").glob("*/*")) == []


def text_file(folder, clip):
    path = folder / "text.mp4"
    path.write_text("this is no video\n" * 100)
    return path


def empty_file(folder, clip):
    path = folder / "empty.mp4"
    path.touch()
    return path


def truncated(folder, clip):
    path = folder / "truncated.mp4"
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    return path


def audio(folder, clip):
    return write_audio(folder / "audio.m4a")


def tiny(folder, clip):
    return write_video(folder / "tiny.mkv", frames=3, size=(1, 1), codec="ffv1", pixel_format="gray")


def endless(folder, clip):
    return write_video(folder / "long.mkv", frames=2, times=[0, 10**9])


def picture(folder, clip):
    path = folder / "picture.png"
    write_video(path, frames=1, codec="png", pixel_format="rgb24", container_options={"update": "1"})
    return path


def huge(folder, clip):
    return write_video(folder / "huge.mp4", frames=1, size=(9000, 4096), options={"preset": "ultrafast"})


UPLOADS = {
    "37 megapixels": (huge, "video_too_large"),
    "text": (text_file, "not_a_video"),
    "empty": (empty_file, "empty_file"),
    "truncated": (truncated, "truncated_video"),
    "audio only": (audio, "no_video_stream"),
    "1x1 pixels": (tiny, "video_too_small"),
    "eleven days": (endless, "video_too_long"),
    "a picture": (picture, "not_a_video"),
}


@pytest.mark.parametrize("kind", UPLOADS)
def test_files_that_are_no_usable_video(server, clips, tmp_path, kind):
    make, code = UPLOADS[kind]
    with pytest.raises(openai.BadRequestError) as error:
        server.client.files.create(file=make(tmp_path, clips[0]), purpose="vision")
    assert error.value.code == code
    assert error.value.param == "file"
    assert len(error.value.body["message"]) > 20


def test_a_wrong_purpose(server, clips):
    with pytest.raises(openai.BadRequestError) as error:
        server.client.files.create(file=clips[1], purpose="fine-tune")
    assert (error.value.code, error.value.param) == ("invalid_purpose", "purpose")


def test_a_form_without_a_file(server):
    response = httpx.post(f"{server.url}/v1/files", data={"purpose": "vision"}, files={"other": b"x"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
    response = httpx.post(f"{server.url}/v1/files", json={"purpose": "vision"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("seconds", [5, 10**9])
def test_an_impossible_expiry(server, clips, seconds):
    expiry = {"anchor": "created_at", "seconds": seconds}
    with pytest.raises(openai.BadRequestError) as error:
        server.client.files.create(file=clips[1], purpose="vision", expires_after=expiry)
    assert error.value.code == "invalid_expires_after"


def test_unknown_and_deleted_ids(server, clips):
    client = server.client
    file = server.upload(clips[1])
    client.files.delete(file.id)
    part = {"type": "file", "file": {"file_id": file.id}}
    content = [part, {"type": "text", "text": "What is shown?"}]
    for call in (
        lambda: client.files.retrieve("file-unknown"),
        lambda: client.files.delete(file.id),
        lambda: client.files.content(file.id),
        lambda: client.chat.completions.create(model=file.id, messages=QUESTION),
        lambda: client.chat.completions.create(model="file-unknown", messages=QUESTION),
        lambda: client.chat.completions.create(model="base", messages=[{"role": "user", "content": content}]),
        lambda: client.completions.create(model=file.id, prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.code == "video_not_found"


def test_messages_without_a_question(server, ready):
    part = {"type": "file", "file": {"file_id": ready.id}}
    for messages, code in (
        ([], "empty_messages"),
        ([{"role": "user", "content": [part]}], "missing_question"),
        ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "invalid_request"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            server.client.chat.completions.create(model=ready.id, messages=messages)
        assert error.value.code == code


def test_a_video_url_is_never_answered_without_its_video(server, ready):
    part = {"type": "video_url", "video_url": {"url": "https://example.com/video.mp4"}}
    content = [part, {"type": "text", "text": "What is shown?"}]
    with pytest.raises(openai.BadRequestError) as error:
        server.client.chat.completions.create(model="base", messages=[{"role": "user", "content": content}])
    assert error.value.code == "url_not_allowed"


@pytest.mark.parametrize("options", [{"mode": "guess"}, {"wait": -1}, {"wait": "soon"}, {"colour": 1}, "adapter"])
def test_options_that_do_not_exist(server, ready, options):
    with pytest.raises(openai.BadRequestError) as error:
        server.client.chat.completions.create(model=ready.id, messages=QUESTION, extra_body={"f2l": options})
    assert error.value.code == "invalid_f2l_options"


def test_a_prompt_longer_than_the_context(server, ready):
    with pytest.raises(openai.BadRequestError):
        server.client.chat.completions.create(model=ready.id, messages=[{"role": "user", "content": "word " * 20000}])
