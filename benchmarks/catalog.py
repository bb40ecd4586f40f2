"""`python -m benchmarks.catalog`: uploads that several servers enter a second, into PostgreSQL some way off.

Up to four processes with as many threads stand for servers' writers. Each enters uploads of bytes that nobody has, one
after the other, by the transactions that an upload takes (`reserve_video`, `add_file`). Every statement, BEGIN and
COMMIT waits for the round trip first, which on one machine takes almost no time.

`--before a9b58c8^` measures the last commit in which writers waited for one lock of the catalog, too: from a worktree,
by this same file, in turns with the present tree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event

from f2l_vllm.catalog import tables
from f2l_vllm.catalog.catalog import Catalog

_SPAWN = multiprocessing.get_context("spawn")
_SERVERS = 4
_ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure, print, and write the result."""
    from f2l_vllm.bench import record
    from tests.support.postgres import needed_postgres

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--round-trip-ms", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--before", help="also measure this commit, in turns with the present tree")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with needed_postgres() as postgres, _trees(options.before) as trees:
        for _ in range(options.rounds):
            for writers in options.writers:
                for commit, tree in trees.items():
                    given = (postgres.new_database(), writers, options.round_trip_ms / 1e3, options.seconds)
                    found.setdefault((commit, writers), []).append(_measure_in(tree, *given))
                    print(commit, found[commit, writers][-1], flush=True)
    rows = []
    for (commit, _), rounds in found.items():
        rates = [one["uploads_per_s"] for one in rounds]
        rows.append({"commit": commit, **rounds[0], "uploads_per_s": statistics.median(rates), "rounds": rates})
    results: dict[str, Any] = {"rows": rows}
    if options.before is not None:
        before, present = trees
        medians = {(row["commit"], row["writers"]): row["uploads_per_s"] for row in rows}
        ratios = {n: round(medians[present, n] / medians[before, n], 2) for n in options.writers}
        results["times_as_many"] = ratios
        print(ratios)
    configuration = {name: value for name, value in vars(options).items() if name != "json"}
    if options.json is not None:
        record.write(options.json, configuration, results)


@contextmanager
def _trees(before: str | None) -> Iterator[dict[str, Path]]:
    """The commits to measure and where their files are, the present tree last."""
    present = {_git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"): _ROOT}
    if before is None:
        yield present
        return
    commit = _git("rev-parse", "--short=12", f"{before}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="f2l-catalog-") as folder:
        _git("worktree", "add", "--detach", "--force", f"{folder}/tree", commit)
        try:
            yield {commit: Path(folder) / "tree", **present}
        finally:
            _git("worktree", "remove", "--force", f"{folder}/tree")


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", _ROOT, *words], check=True, capture_output=True, text=True).stdout.strip()


def _measure_in(tree: Path, *given: object) -> dict[str, Any]:
    """As `_measure`, with the package of this tree."""
    command = [sys.executable, "-P", __file__, "--measure", json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    ran = subprocess.run(command, check=True, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(ran.stdout)
    return row


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
            _enter(catalog, f"tenant-{writer}", sha256)
            entered[writer] += 1

    with ThreadPoolExecutor(writers) as threads:
        list(threads.map(enter, range(writers)))
    catalog.close()
    results.put((sum(entered), trips))


def _enter(catalog: Any, tenant: str, sha256: str) -> None:
    given = {"adapter_name": f"f2l-{sha256[:32]}", "queue_limit": 1_000_000, "video": catalog.reserve_video(sha256)}
    if hasattr(tables, "Upload"):
        catalog.add_file(tables.Upload(tenant, sha256, 1000, "video.mp4", "vision"), **given)
    else:  # a commit before 7ef0140
        upload = {"tenant": tenant, "filename": "video.mp4", "purpose": "vision", "size": 1000, "sha256": sha256}
        catalog.add_file(**upload, expires_at=None, **given)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(_measure(*json.loads(sys.argv[2]))))
    else:
        main()
