"""`python -m benchmarks.pool_faults`: `f2l-vllm workers` on two machines of one catalog, one of which stands still.

Two programs stand for two machines: each has a data folder of its own. The first is in the middle of a video when all
of its processes are stopped for longer than it is waited for. The second takes the video over. Then the first goes on:
its worker, and when that has put its adapter into the store also the process that reports it. The report has to be
refused. At the end the same with a worker that is killed. All times are the defaults.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, select

from f2l_vllm import models
from f2l_vllm.bench import record
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import jobs
from f2l_vllm.store.address import object_name
from tests.e2e.pool.test_pool import decoders
from tests.e2e.pool.test_pool_process import session, workers_of
from tests.e2e.pool.test_workers import PATIENT, Site, left
from tests.support.postgres import needed_postgres

_MOST_SECONDS = 150.0


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--seconds", type=float, default=90.0, help="how long the first machine stands still")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with needed_postgres() as postgres, tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), models.resolve(options.model), postgres.new_database())
        found = {"stopped": _stop(site, options.seconds), "killed": _kill(site)}
        site.catalog.close()
    print(found, flush=True)
    configuration = {name: value for name, value in vars(options).items() if name != "json"}
    if options.json is not None:
        record.write(options.json, configuration, found)


def _stop(site: Site, seconds: float) -> dict[str, Any]:
    """Seconds from the moment at which the first machine stood still, and what was left in the end."""
    first = site.upload("first", frames=16)
    with site.run("one", program=PATIENT) as one:
        _until(lambda: site.state(first) is VideoState.PROCESSED)
        with site.run("two", program=PATIENT) as two:
            _until(lambda: len(workers_of(two.pid)) == 1)
            _stop_all(two.pid)  # it takes nothing yet
            (worker,) = workers_of(one.pid)
            os.kill(min(decoders(worker)), signal.SIGSTOP)
            video = site.upload("second", frames=30)
            _until(lambda: site.state(video) is VideoState.DECODING)
            (late,) = in_work(site)
            started = time.monotonic()
            _stop_all(one.pid)
            _go_on(two.pid)
            _until(lambda: site.state(video) is VideoState.PROCESSED)
            taken_over = time.monotonic() - started
            time.sleep(max(0.0, started + seconds - time.monotonic()))
            _stop_all(two.pid)
            _go_on(one.pid, but=one.pid)
            _until(lambda: late in _objects(site, "second"))
            _go_on(one.pid)
            went_on = time.monotonic()
            third = site.upload("third", frames=40)  # for the first machine alone
            _until(lambda: site.state(third) is VideoState.PROCESSED)
            works_again = time.monotonic() - went_on
            before = _objects(site, "second")
            site.tidy()
            return {
                "stood_still_s": seconds,
                "taken_over_and_made_after_s": round(taken_over, 1),
                "its_late_report_was_refused": f"{late} is refused" in site.log("one").read_text(),
                "works_again_after_s": round(works_again, 1),
                "adapters_in_the_store_before_tidying": len(before),
                "adapters_in_the_store": len(_objects(site, "second")),
                "it_is_the_catalogs": _objects(site, "second") == {site.catalog.adapter("f2l-second").object},
                "files_left_on_the_first_machine": len(left(site.folder / "one")),
            }


def _kill(site: Site) -> dict[str, Any]:
    with site.run("one", program=PATIENT) as one:
        _until(lambda: len(workers_of(one.pid)) == 1)
        video = site.upload("fourth", frames=50)
        _until(lambda: site.state(video) is not VideoState.UPLOADED)
        started = time.monotonic()
        for worker in workers_of(one.pid):
            os.kill(worker, signal.SIGKILL)
        _until(lambda: site.state(video) is VideoState.PROCESSED)
        site.tidy()
        return {
            "made_after_s": round(time.monotonic() - started, 1),
            "adapters_in_the_store": len(_objects(site, "fourth")),
        }


def in_work(site: Site) -> set[str]:
    """The attempts that run, by what they put into the store."""
    engine = create_engine(site.catalog.url)
    with engine.connect() as connection:
        rows = connection.execute(select(jobs.c.adapter_name, jobs.c.token).where(jobs.c.running == 1)).all()
    engine.dispose()
    return {object_name(row.adapter_name, row.token) for row in rows}


def _objects(site: Site, name: str) -> set[str]:
    return {one for one in site.published() if one.startswith(f"f2l-{name}")}


def _stop_all(leader: int) -> None:
    for pid in session(leader):
        os.kill(pid, signal.SIGSTOP)


def _go_on(leader: int, but: int | None = None) -> None:
    for pid in session(leader) - {but}:
        os.kill(pid, signal.SIGCONT)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _MOST_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


if __name__ == "__main__":
    main()
