"""`python -m benchmarks.leaks`: the same question, thousands of times over hundreds of videos that come and go.

Every video is uploaded and asked once with nothing else going on; that answer is the one it has to keep giving. Then
the question goes to videos at random, many at a time, streamed and not, some clients leaving in the middle, while
videos are deleted or expire and are uploaded again, with prefix caching and chunked prefill on. There are far more
adapters than the engine has slots (`--slots`), and than it keeps in host memory (`--host-slots`), so they are dropped
from both tiers all the time. An answer that differs from the video's own is counted, and counted apart where it is
another video's. In the end every video is deleted and what is left is counted.

A file lives an hour at least, so the clock is turned for it: its end is moved into the past in the server's catalog, by
another connection, and the server finds out as it always does.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIStatusError, AsyncOpenAI
from sqlalchemy import select, update

from benchmarks.fleet import fleet
from f2l_vllm.bench import record
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import LIVE
from f2l_vllm.catalog.tables import files
from f2l_vllm.client import metric, processed
from f2l_vllm.evaluation.percentiles import percentiles
from f2l_vllm.server_process import ServerProcess

_QUESTION = "Describe the video."
_AT_ONCE_BEFORE = 4
_LEAVING = 0.02  # share of the questions whose client goes away in the middle of a streamed answer


@dataclass
class Video:
    """One video's file, the id it has now, and what it answered when asked alone."""

    path: Path
    file_id: str = ""
    answer: str = ""
    changing: bool = False


@dataclass
class Run:
    """What the questions met."""

    client: AsyncOpenAI
    catalog: Catalog
    videos: list[Video]
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    async def upload(self, video: Video) -> None:
        """Upload and wait until it is ready."""
        file = await self.client.files.create(file=video.path, purpose="vision")
        video.file_id = (await processed(self.client, file)).id

    async def ask(self, file_id: str, *, stream: bool = False, leave: bool = False) -> str | None:
        """The answer; None where the client left before its end."""
        messages: Any = [{"role": "user", "content": _QUESTION}]
        options: Any = {"model": file_id, "messages": messages, "temperature": 0, "max_completion_tokens": 40}
        if not stream and not leave:
            completion = await self.client.chat.completions.create(**options)
            return completion.choices[0].message.content or ""
        parts: list[str] = []
        async with await self.client.chat.completions.create(stream=True, **options) as chunks:
            async for chunk in chunks:
                parts += [choice.delta.content or "" for choice in chunk.choices]
                if leave and len(parts) > 3:
                    return None
        return "".join(parts)

    async def question(self) -> None:
        """Ask one video at random and compare."""
        video = self.rng.choice(self.videos)
        file_id, was_changing = video.file_id, video.changing
        leave = self.rng.random() < _LEAVING
        started = time.perf_counter()
        try:
            answer = await self.ask(file_id, stream=self.rng.random() < 0.5, leave=leave)
        except APIStatusError as error:
            gone = error.code == "video_not_found" and (was_changing or video.changing or video.file_id != file_id)
            self.counts["gone meanwhile" if gone else f"error {error.code or error.status_code}"] += 1
            return
        self.seconds.append(time.perf_counter() - started)
        if answer is None:
            self.counts["left"] += 1
        elif answer == video.answer:
            self.counts["right"] += 1
        else:
            of_another = any(answer == other.answer for other in self.videos if other is not video)
            self.counts["another video's answer" if of_another else "a changed answer"] += 1
            self.wrong.append({"file": file_id, "own": video.answer, "got": answer})

    async def change(self) -> None:
        """Delete one video, or let it expire, and upload it again, under a new id."""
        video = self.rng.choice(self.videos)
        if video.changing:
            return
        video.changing = True
        how = self.rng.choice(("deleted", "expired"))
        try:
            if how == "deleted":
                await self.client.files.delete(video.file_id)
            else:
                await asyncio.to_thread(expire, self.catalog, video.file_id)
                while await asyncio.to_thread(is_live, self.catalog, video.file_id):  # else the bytes never leave
                    await asyncio.sleep(0.1)
            await self.upload(video)
            self.counts[f"{how} and uploaded again"] += 1
        finally:
            video.changing = False


async def run(server: ServerProcess, paths: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Upload, ask, change, delete; the counts."""
    catalog = Catalog(f"sqlite:///{server.home / 'catalog.sqlite3'}")
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        work = Run(client, catalog, [Video(path) for path in paths], random.Random(options.seed))
        gate = asyncio.Semaphore(_AT_ONCE_BEFORE)

        async def enter(video: Video) -> None:
            async with gate:
                await work.upload(video)

        await asyncio.gather(*map(enter, work.videos))
        for video in work.videos:
            video.answer = await work.ask(video.file_id) or ""
        distinct = len({video.answer for video in work.videos})
        started = time.perf_counter()
        left = options.questions

        async def asker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                if left % options.change_every == 0:
                    await work.change()
                await work.question()

        await asyncio.gather(*(asker() for _ in range(options.concurrency)))
        seconds = time.perf_counter() - started
        for video in work.videos:
            await client.files.delete(video.file_id)
        await asyncio.sleep(1.0)
        catalog.close()
        return {
            "distinct_answers": distinct,
            "counts": dict(work.counts),
            "wrong": work.wrong[:20],
            "questions_per_second": round(options.questions / seconds, 1),
            "seconds_per_answer": {
                "median": round(statistics.median(work.seconds), 3),
                **{name: round(value, 3) for name, value in percentiles(work.seconds, (99,)).items()},
            },
            "left_1_s_after_the_last_delete": left_behind(server),
        }


def expire(catalog: Catalog, file_id: str) -> None:
    """Let the file's time have come."""
    with catalog._write() as connection:
        connection.execute(update(files).where(files.c.id == file_id).values(expires_at=time.time() - 1))


def is_live(catalog: Catalog, file_id: str) -> bool:
    """Whether the server has still to find out that the file's time has come."""
    with catalog._read() as connection:
        live = select(files.c.id).where(files.c.id == file_id, files.c.state.in_(LIVE))
        return connection.scalar(live) is not None


def left_behind(server: ServerProcess) -> dict[str, float]:
    """Adapters and videos on disk, and what the server's gauges still count."""
    gauges = {name: metric(server.url, name) for name in ("f2l_adapters_resident", "f2l_adapter_leases")}
    folders = {
        name: len([p for p in (server.home / name).rglob("*") if p.is_file()]) for name in ("adapters", "videos")
    }
    return {**gauges, **{f"files in {name}": count for name, count in folders.items()}}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--videos", type=int, default=500)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--change-every", type=int, default=20, help="questions between an end and an upload")
    parser.add_argument("--slots", type=int, default=16, help="--max-loras of the engine")
    parser.add_argument("--host-slots", type=int, default=64, help="--max-cpu-loras of the engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    flags = (
        "--max-loras",
        str(options.slots),
        "--max-cpu-loras",
        str(options.host_slots),
        "--enable-prefix-caching",
        "--enable-chunked-prefill",
    )
    with fleet(options.model, *flags, videos=options.videos, seed=options.seed, fps=10) as (server, paths):
        results = asyncio.run(run(server, paths, options))
    asked = ("model", "videos", "questions", "concurrency", "change_every", "slots", "host_slots", "seed")
    record.write(options.json, {name: getattr(options, name) for name in asked}, results)


if __name__ == "__main__":
    main()
