"""`python -m benchmarks.starving`: what one tenant's question takes while another tenant attacks the server.

One tenant asks about a ready video, one question after the other, at first alone, then while the other tenant does what
`ATTACKS` says, several at a time and without a pause. The median of each is set against the median of the quiet time
just before it, and the API server's memory is watched. What the attacker is answered is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import multiprocessing
import os
import signal
import sqlite3
import statistics
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from f2l_vllm.bench import record
from f2l_vllm.bench.films import Films
from f2l_vllm.evaluation.percentiles import percentiles
from f2l_vllm.server_process import ServerProcess

_KEYS = {"asker": "asker-key", "attacker": "attacker-key"}
_QUESTION = [{"role": "user", "content": "Describe the video."}]
_BASE = "f2l-tiny"
# Constraints of one tenant stand in the way of another's, if of anything.
_JSON = {"response_format": {"type": "json_object"}}
_ASKED_BESIDE: dict[str, dict[str, Any]] = {"schema": _JSON, "allowed-schema": _JSON}


@dataclass
class Attacker:
    """The other tenant: its client, the server, a folder of its own, what it was answered, and what to undo."""

    client: httpx.AsyncClient
    server: ServerProcess
    folder: Path
    answers: Counter[str] = field(default_factory=Counter)
    undo: list[Callable[[], None]] = field(default_factory=list)

    async def ask(self, *parts: dict[str, Any], **options: Any) -> None:
        """One question with these parts."""
        content = [*parts, {"type": "text", "text": "What is shown?"}]
        body = {"model": _BASE, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **options}
        await self.post("/v1/chat/completions", json=body)

    async def post(self, path: str, **options: Any) -> httpx.Response | None:
        """The answer, counted by its status and code."""
        try:
            response = await self.client.post(path, **options)
        except httpx.HTTPError as error:
            self.answers[type(error).__name__] += 1
            return None
        code = ""
        with suppress(ValueError, AttributeError):
            code = str((response.json().get("error") or {}).get("code") or "")
        self.answers[f"{response.status_code} {code}".strip()] += 1
        return response


Prepared = Callable[[], Awaitable[None]]
Attack = Callable[[Attacker], Awaitable[Prepared]]


async def picture(attacker: Attacker) -> Prepared:
    """A PNG of 13,300 x 13,300 pixels in half a megabyte."""
    return await _picture_of(attacker, 13_300)


async def allowed_picture(attacker: Attacker) -> Prepared:
    """A PNG of 7,000 x 7,000 pixels, about the largest that is taken."""
    return await _picture_of(attacker, 7_000)


async def _picture_of(attacker: Attacker, edge: int) -> Prepared:
    url = "data:image/png;base64," + base64.b64encode(await asyncio.to_thread(_png, edge)).decode()

    async def ask() -> None:
        await attacker.ask({"type": "image_url", "image_url": {"url": url}})

    return ask


async def many_pictures(attacker: Attacker) -> Prepared:
    """24 PNGs of 1,400 x 1,400 pixels in one question."""
    url = "data:image/png;base64," + base64.b64encode(await asyncio.to_thread(_png, 1_400)).decode()

    async def ask() -> None:
        await attacker.ask(*[{"type": "image_url", "image_url": {"url": url}}] * 24)

    return ask


async def frames_8k(attacker: Attacker) -> Prepared:
    """A video of 7680 x 4320 pixels, answered from its frames."""
    path = await asyncio.to_thread(_video, attacker.folder / "8k.mp4")
    file_id = await _uploaded(attacker.client, path)
    while (await attacker.client.get(f"/v1/files/{file_id}")).json()["status"] == "uploaded":
        await asyncio.sleep(0.5)

    async def ask() -> None:
        await attacker.ask({"type": "file", "file": {"file_id": file_id}}, f2l={"mode": "frames"})

    return ask


async def watchers(attacker: Attacker) -> Prepared:
    """The progress of a video that stays in work is watched."""
    film = Films(attacker.folder).make(8, 160, "watched")
    begun: asyncio.Task[str] | None = None

    async def begin() -> str:
        """Only now: a worker that is stopped for long is taken for dead, and replaced."""
        for pid in [pid for pid, command in attacker.server.descendants().items() if command.startswith("ray::Hyper")]:
            os.kill(pid, signal.SIGSTOP)
            attacker.undo.append(partial(_continue, pid))
        return await _uploaded(attacker.client, film)

    async def watch() -> None:
        nonlocal begun
        begun = begun or asyncio.create_task(begin())
        file_id = await asyncio.shield(begun)
        try:
            async with attacker.client.stream("GET", f"/v1/files/{file_id}/events") as response:
                async for _ in response.aiter_lines():
                    attacker.answers["lines of events"] += 1
        except httpx.HTTPError as error:
            attacker.answers[type(error).__name__] += 1

    return watch


def _continue(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


async def models(attacker: Attacker) -> Prepared:
    """/v1/models of a tenant with 100,000 files."""
    await _enter_files(attacker, 100_000)

    async def list_models() -> None:
        response = await attacker.client.get("/v1/models")
        attacker.answers[f"{response.status_code}, {len(response.content) >> 10} KiB"] += 1

    return list_models


async def files(attacker: Attacker) -> Prepared:
    """The longest page of /v1/files, of a tenant with 100,000 files."""
    await _enter_files(attacker, 100_000)

    async def list_files() -> None:
        response = await attacker.client.get("/v1/files", params={"limit": 10_000})
        attacker.answers[f"{response.status_code}, {len(response.content) >> 10} KiB"] += 1

    return list_files


async def _enter_files(attacker: Attacker, count: int) -> None:
    """Further rows of one uploaded file, as if it had been uploaded so often."""
    await _uploaded(attacker.client, Films(attacker.folder).make(8, 160, "many"))
    with closing(sqlite3.connect(attacker.server.home / "catalog.sqlite3", timeout=60)) as catalog, catalog:
        names = [row[1] for row in catalog.execute("PRAGMA table_info(files)") if row[1] not in ("number", "id")]
        columns = ", ".join(names)
        catalog.execute(
            f"""WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
            INSERT INTO files (id, {columns}) SELECT 'file-' || printf('%032x', i), {columns}
            FROM n, (SELECT * FROM files WHERE tenant = 'attacker' LIMIT 1) WHERE 'file-' || printf('%032x', i)
            NOT IN (SELECT id FROM files)"""
        )


async def schema(attacker: Attacker) -> Prepared:
    """A JSON schema of 8,000 properties, each time another one."""
    return _constrained(attacker, lambda mark: {f"{mark}{index}": {"type": "string"} for index in range(8_000)})


async def allowed_schema(attacker: Attacker) -> Prepared:
    """A JSON schema of 200 properties, each time another one, which is taken."""
    return _constrained(attacker, lambda mark: {f"{mark}{index}": {"type": "string"} for index in range(200)})


def _constrained(attacker: Attacker, properties: Callable[[str], dict[str, Any]]) -> Prepared:
    numbers = itertools.count()

    async def ask() -> None:
        wanted = {"type": "object", "properties": properties(f"p{next(numbers)}x")}
        form = {"type": "json_schema", "json_schema": {"name": "wanted", "schema": wanted}}
        await attacker.ask(response_format=form)

    return ask


# What is prepared, and how many do it at a time.
ATTACKS: dict[str, tuple[Attack, int]] = {
    "watchers": (watchers, 400),
    "models": (models, 4),
    "files": (files, 4),
    "schema": (schema, 4),
    "allowed-schema": (allowed_schema, 4),
    "picture": (picture, 4),
    "allowed-picture": (allowed_picture, 4),
    "many-pictures": (many_pictures, 4),
    "frames-8k": (frames_8k, 4),
}


def _png(edge: int) -> bytes:
    """Black, and small because of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * edge)
    data = b"".join(packer.compress(row) for _ in range(edge)) + packer.flush()
    header = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _video(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 7680, 4320, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for index in range(8):
            frame = np.full((4320, 7680, 3), 20 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


async def _uploaded(client: httpx.AsyncClient, path: Path) -> str:
    data = {"file": (path.name, path.read_bytes()), "purpose": (None, "vision")}
    response = await client.post("/v1/files", files=data)
    return str(response.raise_for_status().json()["id"])


def questions(url: str, file_id: str, options: dict[str, Any], seconds: float) -> list[float]:
    """How long each question of the asker took, one after the other for so many seconds.

    Runs in a process of its own: in the attackers' one, a question would wait for their requests to be written.
    """
    taken: list[float] = []
    body = {"model": file_id, "messages": _QUESTION, "max_tokens": 16, "temperature": 0, **options}
    with httpx.Client(base_url=url, headers=_head("asker"), timeout=600) as client:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            client.post("/v1/chat/completions", json=body).raise_for_status()
            taken.append(time.perf_counter() - started)
            time.sleep(0.02)
    return taken


def _head(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {_KEYS[tenant]}"}


async def measure(
    server: ServerProcess, asking: Executor, names: list[str], seconds: float, folder: Path, several: int | None
) -> dict[str, Any]:
    """Each attack beside the quiet time before it."""
    pid = api_server(server)
    results: dict[str, Any] = {}

    def client(tenant: str) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=server.url, headers=_head(tenant), timeout=600, limits=limits)

    async def ask(name: str, seconds: float) -> list[float]:
        work = partial(questions, server.url, file_id, _ASKED_BESIDE.get(name, {}), seconds)
        return await asyncio.get_running_loop().run_in_executor(asking, work)

    async with client("asker") as asker, client("attacker") as hostile:
        file_id = await _uploaded(asker, Films(folder).make(8, 160, "asked"))
        while (await asker.get(f"/v1/files/{file_id}")).json()["status"] != "processed":
            await asyncio.sleep(0.2)
        for name in names:
            prepare, usual = ATTACKS[name]
            at_once = several or usual
            attacker = Attacker(hostile, server, folder)
            attack = await prepare(attacker)
            attacker.answers.clear()
            await ask(name, 2)
            quiet = await ask(name, seconds)
            before = resident_mib(pid)
            running = [asyncio.create_task(_again(attack)) for _ in range(at_once)]
            watching = asyncio.create_task(_peak(pid))
            await asyncio.sleep(2)
            attacked = await ask(name, seconds)
            for task in [*running, watching]:
                task.cancel()
            peak = (await asyncio.gather(watching, *running, return_exceptions=True))[0]
            for undo in attacker.undo:
                undo()
            results[name] = {
                "what": (prepare.__doc__ or "").strip(),
                "at_once": at_once,
                "quiet": _summary(quiet),
                "attacked": _summary(attacked),
                "times_as_long": round(statistics.median(attacked) / statistics.median(quiet), 2),
                "api_server_mib": {"before": before, "peak": peak},
                "attacker_was_answered": dict(attacker.answers),
            }
            print(name, json.dumps(results[name]), flush=True)
            await asyncio.sleep(5)  # what the attack left in work
    return results


async def _again(attack: Prepared) -> None:
    while True:
        await attack()
        await asyncio.sleep(0)


async def _peak(pid: int) -> float:
    peak = 0.0
    try:
        while True:
            peak = max(peak, resident_mib(pid))
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        return peak


def _summary(seconds: list[float]) -> dict[str, Any]:
    slowest = {f"{name}_ms": round(1000 * value, 1) for name, value in percentiles(seconds, (90,)).items()}
    return {"questions": len(seconds), "median_ms": round(1000 * statistics.median(seconds), 1), **slowest}


def api_server(server: ServerProcess) -> int:
    """The process id of vLLM's API server."""
    found = {server.process.pid: Path(f"/proc/{server.process.pid}/cmdline").read_text().replace("\0", " ")}
    for pid, command in {**found, **server.descendants()}.items():
        if "f2l_vllm.engine serve" in command:
            return pid
    raise RuntimeError("no API server among the server's processes")


def resident_mib(pid: int) -> float:
    """What of the process is in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="names, by comma")
    parser.add_argument("--seconds", type=float, default=20, help="of questions, quiet and attacked")
    parser.add_argument("--at-once", type=int, help="attackers at a time, instead of the attack's own number")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    names = options.attacks.split(",")
    if unknown := set(names) - ATTACKS.keys():
        parser.error(f"no such attack: {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}")
    asking = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with asking, tempfile.TemporaryDirectory(prefix="f2l-starving-") as name:
        folder = Path(name)
        tenants = folder / "tenants.json"
        tenants.write_text(json.dumps({tenant: [key] for tenant, key in _KEYS.items()}))
        server = ServerProcess(_BASE, folder / "home", env={"F2L_TENANTS": str(tenants)})
        try:
            server.wait_ready()
            results = asyncio.run(measure(server, asking, names, options.seconds, folder, options.at_once))
        finally:
            server.stop()
    record.write(options.json, {"attacks": names, "seconds": options.seconds, "at_once": options.at_once}, results)


if __name__ == "__main__":
    main()
