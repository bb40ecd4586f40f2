"""`python -m benchmarks.streams`: live streams of one server, as their senders and those who ask them find them.

A scene of the synthetic world fills each segment. Senders put MPEG-TS segments by HTTP as HLS senders do; OpenAI's
client asks. What is measured:

- `freshness`: many streams at once in real time; from a segment's last byte to the first token of an answer from it.
- `first_token`: about a stream's last minute and about one uploaded video, in turns.
- `accuracy`: about the last three segments of a stream, and about a file of the same stretch: is there such a thing?
- `churn`: questions about stretches while segments come, and pieces are made and dropped: answers from elsewhere.
- `kills`: a worker, the pool and the server are killed while segments come and a standing question is asked.
- `day`: a day of one stream, sent faster than it happens: the adapters that are there, and the server's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
from openai import AsyncOpenAI

from f2l_vllm import torch_shims
from f2l_vllm.bench import record
from f2l_vllm.server_process import ServerProcess, free_port

torch_shims.install()

from f2l_vllm.synthetic.render import write_mp4  # noqa: E402
from f2l_vllm.synthetic.world import COLOURS, SHAPES, Scene, sample_scenes  # noqa: E402

SUITES = ("freshness", "first_token", "accuracy", "churn", "kills", "day")
_CLOCK = 90_000
_OUTSIDE_SECONDS = 0.5  # segments end on frames


class Films:
    """Segments of any length and place, each of one scene."""

    def __init__(self, folder: Path, scenes: int, size: tuple[int, int]) -> None:
        self.scenes = sample_scenes(scenes, 11, "held-out")
        self._folder, self._size = folder, size
        self._known: dict[tuple[int, float], Path] = {}

    def whole(self, scene: int, seconds: float) -> Path:
        """A scene as an mp4."""
        key = scene % len(self.scenes), seconds
        if key not in self._known:
            path = self._folder / f"scene-{key[0]}-{seconds:g}.mp4"
            # At least one frame a second, and no more frames than a short scene has.
            self._known[key] = write_mp4(self.scenes[key[0]], path, self._size, min(10.0, 240 / seconds), seconds)
        return self._known[key]

    def segment(self, scene: int, seconds: float, begins: float) -> bytes:
        """A scene as a segment of MPEG-TS whose timestamps begin there."""
        return self._joined([self.whole(scene, seconds)], seconds, "mpegts", ".ts", begins)

    def file(self, scenes: Sequence[int], seconds: float) -> bytes:
        """Several scenes one after the other, as one mp4."""
        return self._joined([self.whole(scene, seconds) for scene in scenes], seconds, "mp4", ".mp4", 0.0)

    def _joined(self, paths: Sequence[Path], seconds: float, kind: str, ending: str, begins: float) -> bytes:
        target = self._folder / f"out{ending}"
        with av.open(str(target), "w", format=kind) as output:
            stream = None
            for number, path in enumerate(paths):
                with av.open(str(path)) as source:
                    video = source.streams.video[0]
                    if stream is None:
                        stream = output.add_stream_from_template(video)
                    moved = round((begins + number * seconds) / (video.time_base or Fraction(1, _CLOCK)))
                    for packet in source.demux(video):
                        if packet.dts is not None and packet.pts is not None:
                            packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                            packet.stream = stream
                            output.mux(packet)
        return target.read_bytes()


class Sender:
    """Puts the segments of one stream."""

    def __init__(self, http: httpx.AsyncClient, films: Films, seconds: float, first: int = 0) -> None:
        self._http, self._films, self._seconds = http, films, seconds
        self._next, self.shown = first, list[int]()
        self.id = ""

    async def begin(self, **given: Any) -> Sender:
        """Make the stream."""
        body = {"segment_seconds": self._seconds, "on_end": "delete", **given}
        made = await self._http.post("/v1/streams", json=body)
        made.raise_for_status()
        self.id = made.json()["id"]
        return self

    async def put(self, tries: int = 1) -> None:
        """Put the next segment; a sender tries again while its server is away."""
        scene, number = self._next, len(self.shown)
        segment = self._films.segment(scene, self._seconds, 10.0 + number * self._seconds)
        self._next, self.shown = self._next + 1, [*self.shown, scene]
        for attempt in range(tries):
            try:
                put = await self._http.put(f"/v1/streams/{self.id}/push/{number}.ts", content=segment)
                put.raise_for_status()
                return
            except httpx.TransportError:
                if attempt + 1 == tries:
                    raise
            await asyncio.sleep(0.5)

    async def object(self) -> dict[str, Any]:
        """The stream as clients see it."""
        return dict((await self._http.get(f"/v1/streams/{self.id}")).json())

    async def read(self) -> None:
        """Return when everything is read."""
        while (await self.object())["f2l"]["in_work"]:
            await asyncio.sleep(0.05)

    async def end(self) -> None:
        """Delete the stream."""
        await self._http.delete(f"/v1/streams/{self.id}")


async def ask(client: AsyncOpenAI, model: str, question: str, tokens: int = 16, **f2l: Any) -> tuple[float, str, Any]:
    """Seconds to the first token, the answer, and the answer's `f2l`."""
    began, first, text, details = time.monotonic(), None, "", None
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"f2l": {"wait": 120, **f2l}},
    )
    async for chunk in stream:
        details = getattr(chunk, "f2l", None) or details
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - began
            text += chunk.choices[0].delta.content
    return first or time.monotonic() - began, text, details


async def freshness(options: argparse.Namespace, http: httpx.AsyncClient, client: AsyncOpenAI, films: Films) -> Any:
    """See the module."""
    seconds = options.segment_seconds
    senders = [await Sender(http, films, seconds, first=7 * i).begin() for i in range(options.streams)]
    found: list[float] = []

    async def live(place: int, sender: Sender) -> None:
        start = time.monotonic() + seconds * place / len(senders)
        for number in range(options.segments):
            await asyncio.sleep(max(0.0, start + number * seconds - time.monotonic()))
            began = time.monotonic()
            await sender.put()
            await ask(client, sender.id, "What is there?", tokens=1, last=seconds)
            if number:  # the first comes while all begin
                found.append(time.monotonic() - began)

    await asyncio.gather(*(live(place, sender) for place, sender in enumerate(senders)))
    reading = [(await sender.object())["f2l"]["reading"] for sender in senders]
    for sender in senders:
        await sender.end()
    return {**spread(found), "read_coarsely": reading.count("coarse")}


async def first_token(options: argparse.Namespace, http: httpx.AsyncClient, client: AsyncOpenAI, films: Films) -> Any:
    """See the module."""
    seconds = options.segment_seconds
    sender = await Sender(http, films, seconds).begin(window_seconds=6 * seconds)
    for _ in range(8):
        await sender.put()
    await sender.read()
    video = await client.files.create(file=("one.mp4", films.file([0], seconds)), purpose="vision")
    await ask(client, video.id, "What is there?")
    of_stream, of_video = [], []
    for number in range(options.asked):
        question = f"What is there? ({number})"
        rank = (await ask(client, sender.id, question, tokens=1))[2]["rank"]
        of_stream.append((await ask(client, sender.id, question + " ", tokens=1))[0])
        of_video.append((await ask(client, video.id, question + " ", tokens=1))[0])
    await sender.end()
    await client.files.delete(video.id)
    ratio = statistics.median(of_stream) / statistics.median(of_video)
    return {"stream_s": spread(of_stream), "video_s": spread(of_video), "ratio": round(ratio, 3), "rank": rank}


async def accuracy(options: argparse.Namespace, http: httpx.AsyncClient, client: AsyncOpenAI, films: Films) -> Any:
    """See the module."""
    seconds, rng = options.segment_seconds, random.Random(5)
    sender = await Sender(http, films, seconds).begin()
    right = {"stream": 0, "file": 0}
    asked = 0
    for _ in range(2):
        await sender.put()
    for _ in range(options.stretches):
        await sender.put()
        shown = sender.shown[-3:]
        video = await client.files.create(file=("stretch.mp4", films.file(shown, seconds)), purpose="vision")
        for question, truth in questions([films.scenes[one % len(films.scenes)] for one in shown], rng):
            asked += 1
            for arm, model, f2l in (("stream", sender.id, {"last": 3 * seconds}), ("file", video.id, {})):
                answer = (await ask(client, model, question, **f2l))[1]
                right[arm] += answer.lower().startswith(truth)
        await client.files.delete(video.id)
    await sender.end()
    shares = {arm: round(count / asked, 4) for arm, count in right.items()}
    return {"asked": asked, **shares, "ratio": round(right["stream"] / right["file"], 4)}


def questions(scenes: Sequence[Scene], rng: random.Random) -> list[tuple[str, str]]:
    """Whether a coloured shape is there: one that is, one whose colour and shape are there apart, one that is not."""
    there = sorted({(shape.colour, shape.shape) for scene in scenes for shape in scene.shapes})
    others = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in there]
    chosen = [(rng.choice(there), "yes"), (rng.choice(there), "yes"), *((one, "no") for one in rng.sample(others, 2))]
    return [(f"Is there a {colour} {shape}?", truth) for (colour, shape), truth in chosen]


async def churn(options: argparse.Namespace, http: httpx.AsyncClient, client: AsyncOpenAI, films: Films) -> Any:
    """See the module."""
    seconds = 4.0
    senders = [await Sender(http, films, seconds, first=5 * i).begin() for i in range(3)]
    for sender in senders:
        await sender.put()
    left, outside, failed = options.churn, 0, list[str]()
    asked = 0

    async def asker(number: int) -> None:
        nonlocal left, outside, asked
        rng = random.Random(number)
        while left > 0:
            left -= 1
            sender = rng.choice(senders)
            now = await sender.object()
            origin, head = now["f2l"]["started_at"], now["f2l"]["covered"][-1][1]
            if rng.random() < 0.5:
                length = seconds * rng.randint(1, 12)
                f2l, low, high = {"last": length}, None, None
            else:
                low = origin + seconds * rng.randint(max(0, len(sender.shown) - 12), len(sender.shown) - 1)
                high = low + seconds * rng.randint(1, 6)
                length, f2l = high - low, {"start": low, "end": high}
            try:
                covered = (await ask(client, sender.id, "What is there?", tokens=1, **f2l))[2]["covered"]
            except Exception as error:
                if getattr(error, "code", "") != "span_not_available":
                    failed.append(str(error)[:200])
                continue
            asked += 1
            start, end = covered[0][0], covered[-1][1]
            if low is None or high is None:  # back from what was there when the question came
                outside += end - start > length + _OUTSIDE_SECONDS or end < head - 2 * seconds - _OUTSIDE_SECONDS
            else:
                outside += start < low - _OUTSIDE_SECONDS or end > high + _OUTSIDE_SECONDS

    async def send(sender: Sender) -> None:
        while left > 0:
            await sender.put()
            await asyncio.sleep(seconds)

    await asyncio.gather(*(send(sender) for sender in senders), *(asker(number) for number in range(12)))
    segments = [len(sender.shown) for sender in senders]
    for sender in senders:
        await sender.end()
    return {"answered": asked, "outside": outside, "failed": len(failed), "first": failed[:3], "segments": segments}


async def kills(options: argparse.Namespace, http: httpx.AsyncClient, films: Films, servers: Servers) -> Any:
    """See the module."""
    seconds = 4.0
    sender = await Sender(http, films, seconds).begin()
    asked = {"messages": [{"role": "user", "content": "What is there?"}], "max_tokens": 8, "temperature": 0}
    watch = (await http.post(f"/v1/streams/{sender.id}/watches", json={"request": asked})).json()["id"]
    killed = []
    for number in range(24):
        began = time.monotonic()
        await sender.put(tries=240)
        if number in (5, 10, 15):
            what = {5: "f2l_vllm.pool", 10: "ray::", 15: "server"}[number]
            killed.append({"what": what, "processes": await asyncio.to_thread(servers.kill, what)})
        await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))
    await asyncio.sleep(1.0)
    while (found := await sender.object())["f2l"]["in_work"]:
        await asyncio.sleep(0.5)
    answers: list[dict[str, Any]] = []
    for _ in range(60):  # the duty of a server that was killed is its own again when it is back
        path = f"/v1/streams/{sender.id}/watches/{watch}/answers"
        answers = [one["data"] for one in (await http.get(path)).json()["data"]]
        if answers and answers[-1]["end"] >= found["f2l"]["head"] - 0.1:
            break
        await asyncio.sleep(1.0)
    told = sorted((answer["start"], answer["end"]) for answer in answers)
    doubled = sum(one[1] > other[0] + _OUTSIDE_SECONDS for one, other in itertools.pairwise(told))
    length = sum(end - start for start, end in told)
    missed = round((found["f2l"]["head"] - found["f2l"]["started_at"] - length) / seconds)
    await sender.end()
    return {
        "killed": killed,
        "segments": found["f2l"]["segments"],
        "stretches": len(found["f2l"]["covered"]),
        "failed": len(found["f2l"]["failed"]),
        "answers": len(answers),
        "answers_missed": missed,
        "answers_doubled": doubled,
    }


async def day(options: argparse.Namespace, http: httpx.AsyncClient, client: AsyncOpenAI, films: Films, pid: int) -> Any:
    """See the module."""
    seconds = options.day_segment_seconds
    count = round(options.hours * 3600 / seconds)
    sender = await Sender(http, films, seconds).begin()
    pieces, memory = list[int](), list[float]()
    began = time.monotonic()
    for number in range(count):
        await sender.put()
        await sender.read()  # as in real time, in which longer pieces are read long before the next segment comes
        if number % 10 == 9:
            await ask(client, sender.id, "What is there?", tokens=1, last=seconds)
        if number % max(1, count // 24) == 0:
            pieces.append((await sender.object())["f2l"]["pieces"])
            memory.append(resident_mib(pid))
    await sender.read()
    found = await sender.object()
    covered = found["f2l"]["covered"]
    await sender.end()
    return {
        "hours": options.hours,
        "segments": count,
        "took_s": round(time.monotonic() - began),
        "most_pieces": max([*pieces, found["f2l"]["pieces"]]),
        "pieces": pieces,
        "server_mib": memory,
        "covered_hours": round(sum(end - start for start, end in covered) / 3600, 3),
        "stretches": len(covered),
    }


class Servers:
    """The server, which can be killed and started again on its port and folder."""

    def __init__(self, model: str, home: Path, max_chunks: int) -> None:
        self._model, self._home, self._flags = model, home, ("--max-chunks", str(max_chunks))
        self._port = free_port()
        self.running = self._start()

    def _start(self) -> ServerProcess:
        return ServerProcess(self._model, self._home, *self._flags, port=self._port)

    def kill(self, what: str) -> int:
        """Kill the server and wait until another is ready, or those of its processes with this in their command."""
        if what == "server":
            self.running.process.kill()
            self.running.process.wait()
            self.running = self._start()
            self.running.wait_ready()
            return 1
        found = [pid for pid in _below(self.running.process.pid) if what in _command(pid)]
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return len(found)


def _below(pid: int) -> list[int]:
    """The processes that a process started, and those that these did."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        listed = [
            int(child) for task in children.parent.parent.iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return [found for child in listed for found in [child, *_below(child)]]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def resident_mib(pid: int) -> float:
    """What a process has in memory now."""
    with open(f"/proc/{pid}/status") as status:
        return round(next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024, 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p95 and how many."""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"median": round(statistics.median(ordered), 4), "p95": round(p95, 4), "n": len(ordered)}


async def measure(options: argparse.Namespace, servers: Servers, films: Films) -> dict[str, Any]:
    """Each suite's result."""
    server = servers.running
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    results: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http, client:
        for suite in options.suites.split(","):
            if suite == "kills":
                results[suite] = await kills(options, http, films, servers)
            elif suite == "day":
                results[suite] = await day(options, http, client, films, servers.running.process.pid)
            else:
                results[suite] = await globals()[suite](options, http, client, films)
            print(suite, results[suite], flush=True)
    return results


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--max-chunks", type=int, default=7, help="of the server")
    parser.add_argument("--segment-seconds", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=16, help="freshness: at once")
    parser.add_argument("--segments", type=int, default=9, help="freshness: of each stream")
    parser.add_argument("--asked", type=int, default=60, help="first_token: questions of each arm")
    parser.add_argument("--stretches", type=int, default=60, help="accuracy")
    parser.add_argument("--churn", type=int, default=5000, help="churn: questions")
    parser.add_argument("--hours", type=float, default=24.0, help="day")
    parser.add_argument("--day-segment-seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="f2l-streams-") as name:
        folder = Path(name)
        servers = Servers(options.model, folder / "home", options.max_chunks)
        try:
            films = Films(folder, 48, (320, 240))
            for scene in range(len(films.scenes)):
                films.whole(scene, options.segment_seconds)
            servers.running.wait_ready()
            results = asyncio.run(measure(options, servers, films))
        finally:
            servers.running.stop()
    if options.json is not None:
        record.write(options.json, {key: value for key, value in vars(options).items() if key != "json"}, results)


if __name__ == "__main__":
    main()
