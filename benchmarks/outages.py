"""`python -m benchmarks.outages`: PostgreSQL and the store away, full or slow, and what clients of three servers meet.

The servers are those of `tests.soak.history`: real but for the engine and the worker's model. They stand behind HAProxy
with `launch/haproxy.cfg`. Clients upload and ask all the time. After each fault every accepted video has to be answered
by every server; then all are deleted, and it is measured when nothing is left of them.

- `postgres`: stopped as in a crash, and started after `--away` seconds. `pooled`: the same behind pgbouncer.
- `store`: S3 answers nobody for that time. `slow`: each of its calls takes 200 ms more, about.
- `full`, `read-only`: the store is a folder on a small disk without room, or that cannot be written.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.haproxy import haproxy_version, proxied
from benchmarks.visitors import Visitors, outcome, until_nothing_is_left
from f2l_vllm import torch_shims
from f2l_vllm.bench import record

torch_shims.install()

from tests.soak.history.cluster import Cluster  # noqa: E402
from tests.support.pgbouncer import pooled  # noqa: E402
from tests.support.postgres import Postgres, needed_postgres  # noqa: E402
from tests.support.s3 import S3, temporary_s3  # noqa: E402

FAULTS = ("postgres", "pooled", "store", "slow", "full", "read-only")
_OF_S3 = {"store", "slow"}
_DISK_BYTES = 16 << 20
_SLOW_SECONDS = 0.2
_AGAIN_SECONDS = 5.0  # after the end of a fault everything has to be answered
_LEFT_SECONDS = 2.0  # after the last deletion nothing may be left
_BEFORE_SECONDS, _AFTER_SECONDS = 3.0, 8.0
_FIRST_VIDEOS = 10


async def measure(fault: str, options: argparse.Namespace, postgres: Postgres, s3: S3 | None) -> dict[str, Any]:
    """One fault, with servers of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f2l-outages-")))
        database, place = postgres.new_database(), dict[str, Any](hurries=False)
        if fault == "pooled":
            place |= {"listen": database}
            database = stack.enter_context(pooled(database))
        if s3 is not None and fault in _OF_S3:
            place |= {"store": f"{s3.url}/{fault}", "store_seconds": _SLOW_SECONDS if fault == "slow" else 0.0}
        if fault in ("full", "read-only"):
            stack.enter_context(_small_disk(folder / "store"))
        cluster = Cluster(folder, postgres, options.servers, 1, database=database, **place)
        stack.callback(cluster.end)
        await cluster.until_ready()
        servers = [f"127.0.0.1:{server.place.port}" for server in cluster.servers.values()]
        socket = await asyncio.to_thread(stack.enter_context, proxied(servers, folder))
        visitors = Visitors(cluster, socket, folder)
        try:
            return await _visit(fault, options, cluster, visitors, _harm(fault, options, folder, postgres, s3))
        finally:
            await visitors.close()


async def _visit(
    fault: str, options: argparse.Namespace, cluster: Cluster, visitors: Visitors, harm: Callable[[], Awaitable[None]]
) -> dict[str, Any]:
    first = [await visitors.upload() for _ in range(_FIRST_VIDEOS)]
    await visitors.until_answered([file_id for file_id in first if file_id is not None])
    visitors.visits.clear()
    async with visitors.visiting(options.uploaders, options.askers):
        await asyncio.sleep(_BEFORE_SECONDS)
        begin = time.monotonic()
        await harm()
        end = time.monotonic()
        await asyncio.sleep(_AFTER_SECONDS)
    found = outcome(visitors.visits, begin, end)
    accepted = [*visitors.accepted]
    found |= {"accepted": len(accepted), "lost": await visitors.until_answered(accepted)}
    await asyncio.gather(*(visitors.delete(file_id) for file_id in accepted))
    seconds, left = await until_nothing_is_left(cluster, 60)
    return {**found, "nothing_left_after_s": round(seconds, 2), "left": left}


def _harm(
    fault: str, options: argparse.Namespace, folder: Path, postgres: Postgres, s3: S3 | None
) -> Callable[[], Awaitable[None]]:
    """What makes a fault and ends it."""

    async def postgres_away() -> None:
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(options.away)
        postgres.start()  # in this thread: it ends with the thread that starts it

    async def store_away() -> None:
        assert s3 is not None
        s3.pause()
        await asyncio.sleep(options.away)
        s3.go_on()

    async def full() -> None:
        filler = folder / "store" / "filler"
        with filler.open("wb", buffering=0) as stream:
            for size in (1 << 16, 512, 1):
                try:
                    while True:
                        stream.write(b"\0" * size)
                except OSError:
                    pass
        await asyncio.sleep(options.away)
        filler.unlink()

    async def read_only() -> None:
        while subprocess.run(["mount", "-o", "remount,ro", folder / "store"], stderr=subprocess.DEVNULL).returncode:
            await asyncio.sleep(0.01)  # while somebody writes
        await asyncio.sleep(options.away)
        subprocess.run(["mount", "-o", "remount,rw", folder / "store"], check=True)

    async def nothing() -> None:
        await asyncio.sleep(options.away)

    made = {"postgres": postgres_away, "pooled": postgres_away, "store": store_away, "slow": nothing, "full": full}
    return made.get(fault, read_only)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def faults_of(name: str, found: dict[str, Any]) -> list[str]:
    """What of a measurement may not be, in words."""
    wrong = [f"{name}: wrong answers: {found['wrong']}"] if found["wrong"] else []
    wrong += [f"{name}: {found['lost']} answers about accepted videos are lost"] if found["lost"] else []
    for kind in ("upload", "ask"):
        last, again = found[kind]["last_failure_after_s"], found[kind]["answered_again_after_s"]
        if again is None or max(last, again) > _AGAIN_SECONDS:
            wrong.append(f"{name}: {kind} failed until {last} s after its end, was answered again after {again} s")
    if found["left"] or found["nothing_left_after_s"] > _LEFT_SECONDS:
        wrong.append(f"{name}: after {found['nothing_left_after_s']} s this was left: {found['left']}")
    return wrong


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of them")
    parser.add_argument("--away", type=float, default=10.0, help="seconds that a fault lasts")
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--uploaders", type=int, default=2)
    parser.add_argument("--askers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results, wrong, faults = {}, list[str](), options.faults.split(",")
    with ExitStack() as stack:
        s3 = None
        if {*faults} & _OF_S3:
            s3 = stack.enter_context(temporary_s3())
            os.environ.update(s3.environment)  # before the first server is started: all are forked from one process
        for fault in faults:
            with needed_postgres() as postgres:
                results[fault] = asyncio.run(measure(fault, options, postgres, s3))
            print(fault, results[fault], flush=True)
            wrong += faults_of(fault, results[fault])
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        record.write(options.json, {**configuration, "haproxy": haproxy_version()}, results)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
