"""`python -m benchmarks.ending`: what clients see, and what is left, when a server or one of its parts is ended.

SIGTERM: `--streams` answers are being streamed, others are asked for in one piece, wait for a video or watch its
progress, and one upload comes slowly, when the server is told to stop; more ask while it stops. SIGKILL: with streams
and jobs in work the API server, the engine, the pool or a worker is killed alone; `--after` seconds later what is left
is counted, the server is started again where it ended, and every video has to become ready and answer as itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import APIError, APIStatusError, OpenAI

from f2l_vllm import torch_shims
from f2l_vllm.bench import record
from f2l_vllm.client import metric, upload
from f2l_vllm.models import resolve
from f2l_vllm.server_process import ServerProcess
from tests.support.stages import alive

torch_shims.install()

_QUESTION: Any = [{"role": "user", "content": "Describe the video."}]
_PARTS = ("server", "engine", "pool", "worker")
_POLL_SECONDS = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1900, help="of each answer")
    parser.add_argument("--grace", type=float, nargs="*", default=[5.0] * 5, help="F2L_SHUTDOWN_SECONDS of each stop")
    parser.add_argument("--kill", nargs="*", default=list(_PARTS), choices=_PARTS, help="parts, one after another")
    parser.add_argument("--videos", type=int, default=8, help="uploaded when a part is killed")
    parser.add_argument("--after", type=float, default=10.0, help="seconds after which is counted what is left")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = {"sigterm": [], "sigkill": []}
    with tempfile.TemporaryDirectory(prefix="f2l-ending-") as name:
        folder = Path(name)
        clips = make_clips(folder, 2 + options.videos)
        for index, grace in enumerate(options.grace):
            results["sigterm"].append(stop(options, folder / f"stop-{index}", clips[0], clips[1], grace))
            print(json.dumps(results["sigterm"][-1]), flush=True)
        for part in options.kill:
            results["sigkill"].append(kill(options, folder / f"kill-{part}", clips, part))
            print(json.dumps(results["sigkill"][-1]), flush=True)
    configuration = {key: value for key, value in vars(options).items() if key != "json"}
    record.write(options.json, configuration, results)


def stop(options: argparse.Namespace, folder: Path, ready: Path, slow: Path, grace: float) -> dict[str, Any]:
    """SIGTERM under load: seconds to the end, the exit code, and what everybody saw."""
    with serving(options.model, folder, F2L_SHUTDOWN_SECONDS=f"{grace:g}") as server, ThreadPoolExecutor(64) as threads:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        file_id = upload(client, ready)[0].id
        begun = threading.Barrier(options.streams + 1)
        seen = {
            "streams": [threads.submit(stream, client, file_id, options.tokens, begun) for _ in range(options.streams)]
        }
        begun.wait(120)
        whole = {"model": file_id, "max_tokens": options.tokens, "extra_body": {"ignore_eos": True}}
        seen["in one piece"] = [threads.submit(ask, client, **whole) for _ in range(2)]
        workers = [pid for pid, command in server.descendants().items() if command.startswith("ray::Hyper")]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # so that a video stays in work
        waiting = client.files.create(file=slow, purpose="vision").id
        seen["waiting for a video"] = [threads.submit(ask, client, model=waiting, extra_body={"f2l": {"wait": 300}})]
        seen["watching progress"] = [threads.submit(watch, server.url, waiting)]
        seen["uploading"] = [threads.submit(trickle, server.url)]
        time.sleep(0.5)
        parts = set(server.descendants())
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        seen["asking meanwhile"] = [threads.submit(ask, client, model=file_id, max_tokens=4) for _ in range(4)]
        code = ended(server, grace + 60)
        seconds = time.monotonic() - began
        if code is None:
            server.process.kill()
        time.sleep(1)
        left = len(alive(parts))
        said = {who: dict(Counter(future.result(60) for future in futures)) for who, futures in seen.items()}
    return {"grace": grace, "seconds": round(seconds, 2), "exit_code": code, "left_after_1_s": left, "seen": said}


def kill(options: argparse.Namespace, folder: Path, clips: list[Path], part: str) -> dict[str, Any]:
    """SIGKILL of one part under load: what is left, and whether anything was lost."""
    with serving(options.model, folder) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        files = dict(zip(clips, (file.id for file in upload(client, *clips)), strict=True))
        answers = {clip: answer(client, file_id) for clip, file_id in files.items()}
        for clip in clips[1:]:
            client.files.delete(files.pop(clip))
        begun = threading.Barrier(options.streams + 1)
        with ThreadPoolExecutor(64) as threads:
            kept = files[clips[0]]
            streams = [threads.submit(stream, client, kept, options.tokens, begun) for _ in range(options.streams)]
            begun.wait(120)
            files |= {clip: client.files.create(file=clip, purpose="vision").id for clip in clips[1:]}
            parts = server.descendants()
            marks = {"engine": "EngineCore", "pool": "f2l_vllm.pool", "worker": "ray::Hyper"}
            victims = [pid for pid, command in parts.items() if marks.get(part, "\0") in command]
            os.kill(server.process.pid if part == "server" else victims[0], signal.SIGKILL)
            ends = part in ("server", "engine")
            began = time.monotonic()
            gone = None
            while time.monotonic() - began < options.after:
                if ends and gone is None and not alive({server.process.pid, *parts}):
                    gone = round(time.monotonic() - began, 2)
                server.process.poll()
                time.sleep(_POLL_SECONDS)
            left = {
                "processes": sorted(parts[pid][:60] for pid in alive(set(parts))) if ends else [],
                "work in tmp": [path.name for path in (folder / "home" / "tmp").glob("*/*")],
                "rows of jobs": rows(folder / "home" / "catalog.sqlite3"),
            }
            said = dict(Counter(future.result(300) for future in streams))
        if ends:
            server.end()
            server = ServerProcess(options.model, folder / "home")
            server.wait_ready()
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        try:
            again = {clip: answer(client, file_id, wait=300) for clip, file_id in files.items()}
            left["leases"] = metric(server.url, "f2l_adapter_leases")
            left["jobs in the end"] = rows(folder / "home" / "catalog.sqlite3")
        finally:
            if ends:
                server.end()
    lost = sum(again[clip] != answers[clip] for clip in files)
    return {
        "killed": part,
        "all_gone_after": gone,
        f"left_after_{options.after:g}_s": left,
        "streams": said,
        "lost": lost,
    }


@contextmanager
def serving(model: str, folder: Path, **env: str) -> Iterator[ServerProcess]:
    """A ready server for a block, its end whatever happens."""
    folder.mkdir()
    server = ServerProcess(str(resolve(model)), folder / "home", env=env)
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


def make_clips(folder: Path, count: int) -> list[Path]:
    """Small videos of training scenes."""
    from f2l_vllm.synthetic.render import write_mp4
    from f2l_vllm.synthetic.world import sample_scenes

    scenes = enumerate(sample_scenes(count, 7, "train"))
    return [write_mp4(scene, folder / f"{index}.mp4", size=(160, 120), fps=8, seconds=2.5) for index, scene in scenes]


def answer(client: OpenAI, file_id: str, wait: float = 30) -> str:
    options: Any = {"temperature": 0, "max_tokens": 30, "extra_body": {"f2l": {"wait": wait}}}
    return client.chat.completions.create(model=file_id, messages=_QUESTION, **options).choices[0].message.content or ""


def ask(client: OpenAI, **options: Any) -> str:
    """What a client saw of an answer in one piece."""
    try:
        client.chat.completions.create(messages=_QUESTION, **options)
    except (APIError, httpx.HTTPError) as error:
        return in_words(error)
    return "the whole answer"


def stream(client: OpenAI, file_id: str, tokens: int, begun: threading.Barrier) -> str:
    """What a client saw of a streamed answer."""
    options: Any = {"stream": True, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}
    reason = None
    try:
        chunks = client.chat.completions.create(model=file_id, messages=_QUESTION, **options)
        next(iter(chunks))
        begun.wait(120)
        for chunk in chunks:
            reason = chunk.choices[0].finish_reason if chunk.choices else reason
    except (APIError, httpx.HTTPError) as error:
        return in_words(error)
    return {"length": "the whole answer", None: "an end without a reason"}.get(reason, f"finish_reason {reason}")


def watch(url: str, file_id: str) -> str:
    """The last event of a file's progress."""
    try:
        events = httpx.get(f"{url}/v1/files/{file_id}/events", timeout=300).text.strip().split("\n\n")
    except httpx.HTTPError as error:
        return type(error).__name__
    last = events[-1].removeprefix("data: ")
    return last if last == "[DONE]" else f"error {json.loads(last)['error']['code']}"


def trickle(url: str) -> str:
    """What the client of an upload saw that never ends."""
    host, port = url.removeprefix("http://").split(":")
    headers = "Host: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 9999999"
    head = f"POST /v1/files HTTP/1.1\r\n{headers}\r\n\r\n"
    part = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    with closing(socket.create_connection((host, int(port)))) as connection:
        connection.sendall((head + part).encode())
        connection.settimeout(0.1)
        said = b""
        while True:
            try:
                connection.sendall(b"x" * 1000)
                said += (got := connection.recv(65536))
                if not got:
                    break
            except TimeoutError:
                continue
            except OSError as error:
                if not said:
                    return type(error).__name__
                break
    if not said:
        return "nothing"
    start, body = said.split(b"\r\n\r\n", 1)
    return f"{start.split()[1].decode()} {json.loads(body)['error']['code']}"


def in_words(error: APIError | httpx.HTTPError) -> str:
    """What a request raised."""
    if isinstance(error, APIStatusError):
        return f"{error.status_code} {error.code}"
    if isinstance(error, APIError) and error.code:
        return f"error {error.code}"
    return f"{type(error).__name__}: {error}"


def ended(server: ServerProcess, seconds: float) -> int | None:
    """The exit code; None if it still runs after so long."""
    until = time.monotonic() + seconds
    while (code := server.process.poll()) is None and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return code


def rows(catalog: Path) -> int:
    """Jobs in the catalog."""
    with closing(sqlite3.connect(catalog)) as connection:
        return int(connection.execute("SELECT count(*) FROM jobs").fetchone()[0])


if __name__ == "__main__":
    main()
