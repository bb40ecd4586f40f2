"""A live stream as ffmpeg pushes it, asked with the stock client; standing questions; on after a kill."""

import asyncio
import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest

from f2l_vllm.server_process import free_port
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes
from tests.support.rtsp_source import RtspSource

SECONDS, COUNT = 4, 6
QUESTION = "What colour is the shape?"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A scene for every segment, as one MPEG-TS."""
    folder = tmp_path_factory.mktemp("film")
    scenes = [
        write_mp4(scene, folder / f"{i}.mp4", (160, 120), 6, SECONDS) for i, scene in enumerate(sample_scenes(COUNT, 7))
    ]
    (folder / "list.txt").write_text("".join(f"file '{path}'\n" for path in scenes))
    keys = f"expr:gte(t,n_forced*{SECONDS})"
    joined = ["-f", "concat", "-safe", "0", "-i", folder / "list.txt"]
    command = ["ffmpeg", "-v", "error", *joined, "-c:v", "libx264", "-force_key_frames", keys, "-bf", "0"]
    subprocess.run([*command, folder / "film.ts"], check=True)
    subprocess.run([*hls(folder / "film.ts"), folder / "live.m3u8"], check=True)
    return folder


def hls(source, *options):
    output = ["-c", "copy", "-f", "hls", "-hls_time", str(SECONDS), "-hls_list_size", "0"]
    return ["ffmpeg", "-v", "error", "-i", source, *output, *options]


def begun(server, **given):
    body = {"segment_seconds": SECONDS, "window_seconds": 2 * SECONDS, **given}
    return server.client.post("/streams", body=body, cast_to=httpx.Response).json()


def pushed(server, film, stream):
    subprocess.run([*hls(film / "film.ts", "-method", "PUT"), stream["push_url"] + "live.m3u8"], check=True)


def put(server, film, stream, number):
    content = (film / f"live{number}.ts").read_bytes()
    found = httpx.put(f"{stream['push_url']}live{number}.ts", content=content, timeout=60)
    assert found.status_code in (200, 201), found.text


def shown(server, stream):
    return server.client.get(f"/streams/{stream['id']}", cast_to=httpx.Response).json()


def until(what, seconds=120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come to this")


def ask(server, model, **f2l):
    messages = [{"role": "user", "content": QUESTION}]
    made = server.client.chat.completions.create(
        model=model, messages=messages, max_tokens=16, temperature=0, extra_body={"f2l": {"wait": 60, **f2l}}
    )
    return made.choices[0].message.content, made.f2l


def test_a_stream_that_ffmpeg_pushes_is_asked_by_its_id(default_server, film):
    server, stream = default_server, begun(default_server)
    pushed(server, film, stream)
    assert stream["id"] in [model.id for model in server.client.models.list()]
    assert server.client.models.retrieve(stream["id"]).id == stream["id"]
    # ffmpeg waits for no answer, so that its last segments may still be on their way.
    origin = until(lambda: (now := shown(server, stream))["f2l"]["segments"] == COUNT and now["f2l"]["started_at"])
    for number in range(COUNT - 2, COUNT):
        start = SECONDS * number
        answer, f2l = ask(server, stream["id"], start=start, end=start + SECONDS)
        (video,) = f2l["videos"]
        assert (video["stream_id"], video["covered"]) == (stream["id"], [[start, start + SECONDS]])
        assert f2l["covered"] == [
            [pytest.approx(origin + start, abs=0.01), pytest.approx(origin + start + SECONDS, abs=0.01)]
        ]
        assert f2l["visual_tokens"] == 0
        path = film / f"live{number}.ts"
        assert answer == ask(server, server.upload(path).id)[0]
    _, f2l = ask(server, stream["id"])
    assert f2l["videos"][0]["covered"] == [[SECONDS * (COUNT - 2), SECONDS * COUNT]]
    assert f2l["age_seconds"] >= 0
    _, f2l = ask(server, stream["id"], last=SECONDS)
    assert f2l["videos"][0]["covered"] == [[SECONDS * (COUNT - 1), SECONDS * COUNT]]
    ended = until(lambda: (now := shown(server, stream))["file_id"] and not now["f2l"]["pieces"] and now)
    assert (ended["status"], len(ended["f2l"]["chapters"])) == ("ended", COUNT)
    assert server.client.files.retrieve(ended["file_id"]).status == "processed"
    assert ask(server, stream["id"])[1]["videos"][0]["file_id"] == ended["file_id"]
    server.client.delete(f"/streams/{stream['id']}", cast_to=httpx.Response)
    server.client.files.delete(ended["file_id"])
    with pytest.raises(openai.NotFoundError):
        ask(server, stream["id"])


class Receiver(ThreadingHTTPServer):
    """Takes webhooks on loopback; refuses the first."""

    def __init__(self, port):
        super().__init__(("127.0.0.1", port), _Hook)
        self.port, self.tries, self.taken = port, 0, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.tries += 1
        is_first = self.server.tries == 1
        if not is_first:
            self.server.taken.append((body, dict(self.headers)))
        self.send_response(503 if is_first else 204)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_each_segment_has_an_answer_for_readers_and_webhook(default_server, film):
    server, stream = default_server, begun(default_server, on_end="delete")
    receiver = Receiver(free_port())
    path = f"/streams/{stream['id']}/watches"
    asked = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16, "temperature": 0}
    body = {"request": asked, "webhook_url": f"http://127.0.0.1:{receiver.port}/hook"}
    watch = server.client.post(path, body=body, cast_to=httpx.Response).json()
    for number in range(3):
        put(server, film, stream, number)
    answers = until(
        lambda: (
            len(found := server.client.get(f"{path}/{watch['id']}/answers", cast_to=httpx.Response).json()["data"]) == 3
            and found
        )
    )
    starts = [answer["data"]["start"] for answer in answers]
    assert starts == sorted(set(starts))
    assert [answer["data"]["answer"] for answer in answers] == [
        ask(server, stream["id"], start=SECONDS * number, end=SECONDS * (number + 1))[0] for number in range(3)
    ]
    until(lambda: len(receiver.taken) == 3)
    for (sent, headers), answer in zip(receiver.taken, answers, strict=True):
        server.client.webhooks.verify_signature(sent.decode(), headers, secret=watch["secret"])
        assert json.loads(sent) == answer
        assert headers["webhook-id"] == answer["id"]
    server.client.post(f"/streams/{stream['id']}/end", cast_to=httpx.Response)
    told = server.client.get(f"{path}/{watch['id']}/events", cast_to=httpx.Response).text
    assert [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: {")] == answers
    server.client.delete(f"/streams/{stream['id']}", cast_to=httpx.Response)
    receiver.shutdown()
    receiver.server_close()


def test_a_standing_question_that_makes_no_sense_is_refused(default_server):
    stream = begun(default_server)
    wrong = [{}, {"question": "a", "request": {"messages": []}}, {"request": {"messages": [], "model": "x"}}]
    wrong += [{"question": "a", "webhook_url": "ftp://example.com"}, {"request": {"prompt": "a"}}, {"question": ""}]
    for body in wrong:
        with pytest.raises(openai.BadRequestError):
            default_server.client.post(f"/streams/{stream['id']}/watches", body=body, cast_to=httpx.Response)
    default_server.client.delete(f"/streams/{stream['id']}", cast_to=httpx.Response)


@pytest.mark.parametrize("f2l", [{"last": 0}, {"last": 5, "start": 1}, {"start": "yesterday"}, {"start": 5, "end": 5}])
def test_a_stretch_that_makes_no_sense_is_refused(default_server, f2l):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(default_server, "stream-0", **f2l)
    assert refused.value.code == "invalid_span"


def test_a_stream_without_a_segment_says_so_and_frames_are_for_files(default_server, film):
    stream = begun(default_server)
    with pytest.raises(openai.ConflictError) as refused:
        ask(default_server, stream["id"])
    assert refused.value.code == "stream_is_empty"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(default_server, stream["id"], mode="frames")
    assert refused.value.code == "invalid_f2l_options"
    default_server.client.delete(f"/streams/{stream['id']}", cast_to=httpx.Response)


def test_questions_during_churn_are_answered_from_their_stretch_alone(default_server, film):
    """Segments come, pieces are made and dropped, and whatever is asked is answered from inside the stretch."""
    server, stream = default_server, begun(default_server, on_end="delete")
    put(server, film, stream, 0)
    seen = []

    async def asker(number):
        client = openai.AsyncOpenAI(base_url=server.client.base_url, api_key="none", max_retries=0)
        while not done.is_set():
            last = SECONDS * (1 + number % 3)
            made = await client.chat.completions.create(
                model=stream["id"],
                messages=[{"role": "user", "content": QUESTION}],
                max_tokens=4,
                extra_body={"f2l": {"last": last, "wait": 60}},
            )
            seen.append((last, made.f2l["covered"]))

    async def churn():
        for number in range(1, COUNT):
            await asyncio.to_thread(put, server, film, stream, number)
            await asyncio.sleep(1.0)
        done.set()

    async def whole():
        await asyncio.gather(churn(), *(asker(number) for number in range(3)))

    done = asyncio.Event()
    asyncio.run(whole())
    origin = shown(server, stream)["f2l"]["started_at"]
    assert len(seen) > COUNT
    for last, covered in seen:
        (first, _), (_, end) = covered[0], covered[-1]
        assert end - first <= last + 0.5
        assert (first - origin) % SECONDS == pytest.approx(0, abs=0.1) or (first - origin) % SECONDS > SECONDS - 0.1
    server.client.delete(f"/streams/{stream['id']}", cast_to=httpx.Response)


def sources(server, state):
    name = f'f2l_stream_sources_total{{state="{state}"}} '
    (line,) = (line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if line.startswith(name))
    return float(line.removeprefix(name))


def test_a_source_is_pulled_until_it_says_goodbye(default_server, film):
    before = sources(default_server, "connected")
    with RtspSource(film / "film.ts") as source:
        stream = begun(default_server, source=f"rtsp://127.0.0.1:{source.port}/film", window_seconds=60)
        found = until(lambda: (now := shown(default_server, stream))["status"] == "ended" and now)
        _, f2l = ask(default_server, stream["id"], last=SECONDS + 1)
    assert found["f2l"]["segments"] >= COUNT - 1  # the last may end with the connection
    assert found["f2l"]["source"]["state"] == "connected"
    assert sources(default_server, "connected") == before + 1
    ((start, end),) = f2l["covered"]
    assert SECONDS - 1 <= end - start <= SECONDS + 1.5
    put_there = httpx.put(f"{default_server.url}/v1/streams/{stream['id']}/push/live0.ts", content=b"x")
    assert put_there.json()["error"]["code"] == "stream_is_pulled"
    default_server.client.delete(f"/streams/{stream['id']}", cast_to=httpx.Response)


def test_a_source_that_may_not_be_read_ends_the_stream_and_says_why(default_server):
    stream = begun(default_server, source="rtsp://192.0.2.1/x", on_end="delete")
    until(lambda: shown(default_server, stream)["status"] == "ended")
    why = until(lambda: (found := shown(default_server, stream)["f2l"]["source"])["state"] == "failed" and found["why"])
    assert why.startswith("url_not_allowed")
    assert sources(default_server, "failed") >= 1
    with pytest.raises(openai.BadRequestError):
        begun(default_server, source="file:///etc/passwd")
    default_server.client.delete(f"/streams/{stream['id']}", cast_to=httpx.Response)
