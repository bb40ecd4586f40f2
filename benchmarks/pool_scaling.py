"""`python -m benchmarks.pool_scaling`: workers in Ray Serve come with videos, and go while one of them is at work.

Ray Serve, PostgreSQL and the store are real; a worker has no model and takes a video `--seconds`. In each round seven
videos are uploaded where no worker is. Three workers come and take two each. While one reads the last video, the others
have nothing to do, so that two of the three are told to stop. They are given up after 3 s instead of 30, and nothing
else differs from the defaults.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pool_faults import in_work
from f2l_vllm import models
from f2l_vllm.bench import record
from f2l_vllm.catalog.states import VideoState
from tests.e2e.cluster.test_workers import ray_serve, replicas, start
from tests.e2e.pool.test_pool import until
from tests.e2e.pool.test_workers import Site, left
from tests.support.postgres import needed_postgres

_WORKERS, _VIDEOS = 3, 7
_DECIDED_SECONDS = 2.0


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="what a video takes a worker")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with needed_postgres() as postgres, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = Site(folder, models.resolve("f2l-tiny"), postgres.new_database())
        with ray_serve(folder, site, options.seconds):
            start(site)
            rounds = [_round(site, number) for number in range(options.rounds)]
        site.catalog.close()
    medians = {name: median(one[name] for one in rounds) for name in ("decided_s", "ready_s")}
    found = {"medians": medians, "rounds": rounds}
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        record.write(options.json, {**configuration, "workers": _WORKERS, "videos": _VIDEOS}, found)
    if wrong := _faults(rounds):
        raise SystemExit("\n".join(wrong))


def _round(site: Site, number: int) -> dict[str, Any]:
    """Seconds from the last upload until Serve has decided on all workers and until all of them read a video, and what
    became of the videos."""
    until(lambda: replicas() == {})
    before = site.published()
    first = number * _VIDEOS
    records = [site.upload(f"{index}", frames=4 + index) for index in range(first, first + _VIDEOS)]
    started = time.monotonic()
    until(lambda: sum(replicas().values()) == _WORKERS)
    decided = time.monotonic() - started
    until(lambda: len(in_work(site)) == _WORKERS)
    ready = time.monotonic() - started
    until(lambda: sum(replicas().values()) < _WORKERS or "STOPPING" in replicas())
    at_work = in_work(site)
    stopping = 0
    while {site.state(one) for one in records} - {VideoState.PROCESSED, VideoState.ERROR}:
        stopping = replicas().get("STOPPING", 0)
        time.sleep(0.02)
    until(lambda: replicas() == {})
    site.tidy()
    kept = {one.object for one in (site.catalog.adapter(record.adapter_name) for record in records) if one is not None}
    made = site.published() - before
    found = {
        "decided_s": round(decided, 2),
        "ready_s": round(ready, 2),
        "in_work_at_scale_down": len(at_work),
        "of_a_worker_that_was_told_to_stop": stopping > 0,
        "lost_at_scale_down": len(at_work - kept),
        "adapters_made": len(made),
        "they_are_the_catalogs": made == kept,
        "files_left": sum(len(left(home)) for home in (site.folder / "nodes" / "workers").glob("*")),
    }
    print(found, flush=True)
    return found


def _faults(rounds: list[dict[str, Any]]) -> list[str]:
    """What of a measurement may not be, in words."""
    wrong = []
    for number, one in enumerate(rounds):
        if one["decided_s"] > _DECIDED_SECONDS:
            wrong.append(f"round {number}: {_WORKERS} workers were decided on after {one['decided_s']} s")
        if one["lost_at_scale_down"] or one["adapters_made"] != _VIDEOS or not one["they_are_the_catalogs"]:
            wrong.append(f"round {number}: videos were lost or made twice: {one}")
        if one["files_left"]:
            wrong.append(f"round {number}: {one['files_left']} files were left")
    if not any(one["of_a_worker_that_was_told_to_stop"] for one in rounds):
        wrong.append("no worker was told to stop while it read a video")
    return wrong


if __name__ == "__main__":
    main()
