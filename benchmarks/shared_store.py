"""`python -m benchmarks.shared_store`: the same few bytes uploaded and deleted again and again by servers that share a
catalog and a store, each call of which takes its time.

Every process is a server's videos, without an engine: `enter` and `remove` of the service that the routes call. Several
clients at a time upload one of a few byte strings, read it back as a server would that has never seen it, and delete it
again. An upload that was accepted and whose bytes cannot be read is lost. What is refused because the catalog is busy
is counted and tried again. In the end nothing is live, and what lies in the store all the same is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.server.registry import Registry
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.settings import Settings
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.errors import Unavailable

_TENANT = "t"
_TIDY_SECONDS = 5.0  # as a server's maintenance


class SlowFiles(LocalFileSystem):  # type: ignore[misc]
    """Files behind a network: every call takes `seconds` before it begins."""

    protocol = "slow"
    seconds = 0.01

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    def put_file(self, *args: Any, **options: Any) -> None:
        """Slowly."""
        time.sleep(self.seconds)
        super().put_file(*args, **options)

    def get_file(self, *args: Any, **options: Any) -> None:
        """Slowly."""
        time.sleep(self.seconds)
        super().get_file(*args, **options)

    def rm_file(self, path: str) -> None:
        """Slowly."""
        time.sleep(self.seconds)
        super().rm_file(path)

    def info(self, path: str, **options: Any) -> Any:
        """Slowly."""
        time.sleep(self.seconds)
        return super().info(path, **options)


class _NoEngine:
    async def remove_lora(self, _int_id: int) -> bool:
        return True


def run(
    url: str, folder: Path, *, pairs: int, servers: int, clients: int, videos: int, latency: float
) -> dict[str, Any]:
    """Upload and delete `pairs` times in all; what was lost and what was left.

    Args:
        url: of the catalog's database, empty.
        folder: for the store and the servers' data.
        servers: processes.
        clients: of each, at a time.
        videos: different byte strings.
        latency: of every call to the store, seconds.
    """
    context = multiprocessing.get_context("fork")
    Catalog(url).close()
    results: Any = context.Queue()
    share = pairs // servers
    options = {"clients": clients, "videos": videos, "latency": latency}
    processes = [
        context.Process(target=_serve, args=(url, folder, index, share, options, results)) for index in range(servers)
    ]
    for process in processes:
        process.start()
    counts: Counter[str] = Counter()
    seconds: list[float] = []
    for _ in processes:
        found, took = results.get()
        counts.update(found)
        seconds.append(took)
    for process in processes:
        process.join()
    asyncio.run(_tidy(url, folder))
    left = [path for path in (folder / "far").rglob("*") if path.is_file()]
    return {
        "pairs": counts["accepted"],
        "lost": counts["lost"],
        "refused": counts["refused"],
        "objects_left": len(left),
        "seconds": round(max(seconds), 1),
    }


def _server(url: str, folder: Path, name: str) -> VideoService:
    fsspec.register_implementation("slow", SlowFiles, clobber=True)
    home = folder / name
    store = open_store(home, url=f"slow://{folder / 'far'}")
    catalog = Catalog(url)
    registry = Registry({}, _NoEngine(), store, base_model="base", host_slots=8, wanted=catalog.refers_to)
    settings = Settings(home=home, queue_limit=1_000_000)
    return VideoService(settings, Revisions("base", "one"), catalog, store, registry, None, lambda: False)


def _serve(url: str, folder: Path, index: int, pairs: int, options: dict[str, Any], results: Any) -> None:
    SlowFiles.seconds = options["latency"]
    started = time.monotonic()
    results.put((asyncio.run(_ask(url, folder, index, pairs, options)), time.monotonic() - started))


async def _ask(url: str, folder: Path, index: int, pairs: int, options: dict[str, Any]) -> Counter[str]:
    service = _server(url, folder, f"server{index}")
    counts: Counter[str] = Counter()
    left = pairs

    async def client(number: int) -> None:
        nonlocal left
        dice = random.Random(f"{index} {number}")
        elsewhere = open_store(folder / f"reader{index}-{number}", url=f"slow://{folder / 'far'}")
        while left > 0:
            left -= 1
            data = f"video {dice.randrange(options['videos'])}".encode()
            temporary = service.store.temporary()
            temporary.write_bytes(data)
            upload = Upload(_TENANT, hashlib.sha256(data).hexdigest(), len(data), "v.mp4", "vision")
            try:
                record = await service.enter(temporary, upload)
            except Unavailable:
                left += 1
                counts["refused"] += 1
                continue
            finally:
                service.store.discard(temporary)
            counts["accepted"] += 1
            shutil.rmtree(elsewhere.home / "videos")
            (elsewhere.home / "videos").mkdir()
            try:
                path = await asyncio.to_thread(elsewhere.fetch_video, record.video)
                counts["lost"] += path.read_bytes() != data
            except Exception:
                counts["lost"] += 1
            while True:
                try:
                    await service.remove(record.id, _TENANT)
                    break
                except Unavailable:
                    counts["refused"] += 1
        elsewhere.close()

    async def maintain() -> None:
        while True:
            await asyncio.sleep(_TIDY_SECONDS)
            await service.tidy()

    maintenance = asyncio.create_task(maintain())
    await asyncio.gather(*(client(number) for number in range(options["clients"])))
    maintenance.cancel()
    service.catalog.close()
    return counts


async def _tidy(url: str, folder: Path) -> None:
    service = _server(url, folder, "last")
    await service.tidy()
    service.catalog.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", help="an empty PostgreSQL database by URL; default: a server of its own")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--videos", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.01)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in ("pairs", "servers", "clients", "videos", "latency")}
    with tempfile.TemporaryDirectory(prefix="f2l-shared-") as folder:
        if options.database is not None:
            results = run(options.database, Path(folder), **asked)
        else:
            from tests.support.postgres import needed_postgres

            with needed_postgres() as server:
                results = run(server.new_database(), Path(folder), **asked)
    print(json.dumps(results, indent=1))
    if options.json is not None:
        from f2l_vllm.bench import record

        record.write(options.json, asked, results)


if __name__ == "__main__":
    main()
