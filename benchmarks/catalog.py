"""`python -m benchmarks.catalog`: uploads that several servers enter a second, into PostgreSQL some way off.

Up to four processes with as many threads stand for servers' writers. Each enters uploads of bytes that nobody has, one
after the other, by the transactions that an upload takes (`reserve_video`, `add_file`). Every statement, BEGIN and
COMMIT waits for the round trip first, which on one machine takes almost no time.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import event

from f2l_vllm.bench import record
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import Upload
from tests.support.postgres import needed_postgres

_SPAWN = multiprocessing.get_context("spawn")
_SERVERS = 4


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--round-trip-ms", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with needed_postgres() as postgres:
        for writers in options.writers:
            rows.append(_measure(postgres.new_database(), writers, options.round_trip_ms / 1e3, options.seconds))
            print(rows[-1], flush=True)
    configuration = {name: value for name, value in vars(options).items() if name != "json"}
    if options.json is not None:
        record.write(options.json, configuration, {"rows": rows})


def _measure(url: str, writers: int, round_trip: float, seconds: float) -> dict[str, Any]:
    Catalog(url).close()
    begin, results = _SPAWN.Barrier(min(writers, _SERVERS)), _SPAWN.Queue()
    threads = [writers // _SERVERS + (server < writers % _SERVERS) for server in range(min(writers, _SERVERS))]
    servers = [
        _SPAWN.Process(target=_serve, args=(url, server, count, round_trip, seconds, begin, results))
        for server, count in enumerate(threads)
    ]
    for server in servers:
        server.start()
    found = [results.get() for _ in servers]
    for server in servers:
        server.join()
    uploads, trips = sum(uploads for uploads, _ in found), sum(trips for _, trips in found)
    per_second, each = round(uploads / seconds, 1), round(trips / uploads, 1)
    return {"writers": writers, "uploads_per_s": per_second, "round_trips_each": each}


def _serve(url: str, server: int, writers: int, round_trip: float, seconds: float, begin: Any, results: Any) -> None:
    """One server's writers."""
    catalog, trips, entered = Catalog(url), 0, [0] * writers

    def wait(*_: Any) -> None:
        nonlocal trips
        trips += 1
        time.sleep(round_trip)

    for name in ("before_cursor_execute", "begin", "commit"):
        event.listen(catalog._engine, name, wait)
    begin.wait()
    until = time.monotonic() + seconds

    def enter(writer: int) -> None:
        number = 0
        while time.monotonic() < until:
            number += 1
            sha256 = hashlib.sha256(f"{server}/{writer}/{number}".encode()).hexdigest()
            video = catalog.reserve_video(sha256)
            upload = Upload(f"tenant-{writer}", sha256, 1000, "video.mp4", "vision")
            catalog.add_file(upload, f"f2l-{sha256[:32]}", queue_limit=1_000_000, video=video)
            entered[writer] += 1

    with ThreadPoolExecutor(writers) as threads:
        list(threads.map(enter, range(writers)))
    catalog.close()
    results.put((sum(entered), trips))


if __name__ == "__main__":
    main()
