"""`python -m benchmarks.adopting`: how long a catalog takes to move to other models, and what clients see meanwhile.

Two processes stand for servers without an engine: one answers about files that are ready, the other waits with other
models. Each is asked about one file after the other, chosen at random. Then `f2l-vllm adopt` appoints the second one.
Times count from there. A call to the object store takes a while before it begins.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import random
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from f2l_vllm.bench import record
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import listen
from f2l_vllm.catalog.tables import adapters, files
from f2l_vllm.cli.adopt import adopt
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.registry import Registry
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.settings import Settings
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.errors import Unavailable
from tests.support.engine import Engine
from tests.support.postgres import needed_postgres

_SPAWN = multiprocessing.get_context("spawn")
_TENANT = "t"
_PAUSE_SECONDS = 0.01  # between two questions to a server
_BEFORE_SECONDS = 2.0
_MOST_SECONDS = 600.0


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, nargs="+", default=[5_000, 50_000])
    parser.add_argument("--store-ms", type=float, default=5.0, help="what a call to the object store takes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with needed_postgres() as postgres:
        for count in options.files:
            rows.append(measure(postgres.new_database(), count, options.store_ms / 1e3))
            print(rows[-1], flush=True)
    configuration = {name: value for name, value in vars(options).items() if name != "json"}
    if options.json is not None:
        record.write(options.json, configuration, {"rows": rows})


def measure(url: str, count: int, store_seconds: float) -> dict[str, Any]:
    """Seconds from the appointment, and milliseconds that questions took."""
    ids = _fill(url, count)
    ready, end, results = _SPAWN.Barrier(3), _SPAWN.Event(), _SPAWN.Queue()
    with tempfile.TemporaryDirectory() as folder:
        servers = [
            _SPAWN.Process(target=_run, args=(Path(folder), revision, url, ids, store_seconds, ready, end, results))
            for revision in ("old", "new")
        ]
        for server in servers:
            server.start()
        ready.wait()
        time.sleep(_BEFORE_SECONDS)
        started = time.monotonic()
        adopt(None, url, None)
        took = time.monotonic() - started
        _until_moved(url, count)
        moved = time.monotonic() - started
        time.sleep(1.0)
        end.set()
        found = dict(results.get() for _ in servers)
        for server in servers:
            server.join()
    asked = {name: [(at - started, outcome, ms) for at, outcome, ms in questions] for name, questions in found.items()}
    refusals = [at for at, outcome, _ in asked["old"] if outcome == "OtherModels"]
    first = [at for at, outcome, _ in asked["new"] if at > 0 and outcome != "OtherModels"]
    return {
        "files": count,
        "command_s": round(took, 3),
        "all_files_moved_s": round(moved, 2),
        "old_server_refuses_after_s": round(min(refusals), 3),
        "old_server_refuses_all_after_s": round(
            max((at for at, outcome, _ in asked["old"] if outcome == "answered"), default=0), 3
        ),
        "new_server_takes_questions_after_s": round(min(first), 3),
        "questions": {
            name: {
                when: _summary([(outcome, ms) for at, outcome, ms in questions if begin <= at < over])
                for when, begin, over in (("before", -10.0, 0.0), ("meanwhile", 0.0, moved))
            }
            for name, questions in asked.items()
        },
    }


def _summary(questions: list[tuple[str, float]]) -> dict[str, Any]:
    times = sorted(ms for _, ms in questions)
    outcomes = [outcome for outcome, _ in questions]
    return {
        "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "median_ms": round(statistics.median(times), 1),
        "p99_ms": round(times[int(0.99 * len(times))], 1),
        "most_ms": round(times[-1], 1),
    }


def _fill(url: str, count: int) -> list[str]:
    """Enter so many ready files with their adapters; their ids."""
    catalog, name = Catalog(url), Revisions("base", "old").name
    catalog.appoint(name(""))
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
    now = time.time()
    common = {"tenant": _TENANT, "filename": "v.mp4", "purpose": "vision", "bytes": 1000, "state": "processed"}
    made = {"rank": 16, "bytes": 1000, "info": AdapterInfo(), "created_at": now}
    with catalog._write() as connection:
        connection.execute(
            insert(files),
            [
                {**common, "id": f"file-{sha[:24]}", "sha256": sha, "adapter_name": name(sha), "created_at": now}
                for sha in hashes
            ],
        )
        connection.execute(insert(adapters), [{**made, "name": name(sha)} for sha in hashes])
    catalog.close()
    return [f"file-{sha[:24]}" for sha in hashes]


def _until_moved(url: str, count: int) -> None:
    catalog, deadline = Catalog(url), time.monotonic() + _MOST_SECONDS
    while catalog.counts()[1] < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    catalog.close()


def _run(folder: Path, revision: str, url: str, ids: list[str], store_seconds: float, *ends: Any) -> None:
    asyncio.run(_serve(folder, revision, url, ids, store_seconds, *ends))


async def _serve(
    folder: Path, revision: str, url: str, ids: list[str], store_seconds: float, ready: Any, end: Any, results: Any
) -> None:
    home, catalog = folder / revision, Catalog(url)
    store = open_store(home)

    def has_video(_video: str) -> bool:
        time.sleep(store_seconds)
        return True

    store.has_video = has_video  # type: ignore[method-assign,assignment]
    registry = Registry({}, Engine(), store, base_model="base", host_slots=8, wanted=catalog.refers_to)
    listener = listen(catalog)
    revisions = Revisions("base", revision)
    service = VideoService(Settings(home=home), revisions, catalog, store, registry, None, lambda: False, listener)
    await service.membership.attend()
    attending = asyncio.create_task(service.membership.run())
    while listener is not None and not listener.is_heard:
        await asyncio.sleep(0.05)
    asked = []
    await asyncio.to_thread(ready.wait)
    while not end.is_set():
        asked.append(await _ask(service, random.choice(ids)))
        await asyncio.sleep(_PAUSE_SECONDS)
    attending.cancel()
    with suppress(asyncio.CancelledError):
        await attending
    await asyncio.to_thread(service.close)
    results.put((revision, asked))


async def _ask(service: VideoService, file_id: str) -> tuple[float, str, float]:
    """When it was asked, what came of it, and the milliseconds that it took."""
    started = time.monotonic()
    try:
        if (why := service.membership.why_not_ready) is not None and "another model" in why:
            outcome = "OtherModels"
        else:
            await service.ready(file_id, _TENANT, 0.0)
            outcome = "answered"
    except APIError as error:
        outcome = str(error.code)
    except Unavailable as error:
        outcome = type(error).__name__
    return started, outcome, 1e3 * (time.monotonic() - started)


if __name__ == "__main__":
    main()
