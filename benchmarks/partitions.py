"""`python -m benchmarks.partitions`: three servers and two workers on machines of their own, some of them cut off.

The machines are network namespaces on a bridge (it needs root); PostgreSQL, S3 (moto) and HAProxy with
`launch/haproxy.cfg` are at the bridge. The servers are those of `tests.soak.history`: real but for the engine and the
worker's model. Clients ask all the time.

1. One server and one worker, which is in the middle of a video, lose their links. Another worker makes the video. Some
   videos are deleted meanwhile. When the links are back, nothing may be left of these on the server when it is ready,
   and the worker's late result has to be refused and removed.
2. What another server sends arrives 200 ms late.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import fsspec
import httpx
import psycopg

from benchmarks.haproxy import haproxy_version, proxied
from benchmarks.namespaces import Machine, Network, alone
from benchmarks.visitors import Visitors, outcome, until_nothing_is_left
from f2l_vllm import torch_shims
from f2l_vllm.bench import record

torch_shims.install()

from tests.soak.history.cluster import Cluster, Member  # noqa: E402
from tests.soak.history.server import Place  # noqa: E402
from tests.soak.history.worker import work  # noqa: E402
from tests.support.postgres import needed_postgres  # noqa: E402
from tests.support.s3 import temporary_s3  # noqa: E402

_AWAY, _SLOW = "server-2", "server-1"
_RETURN_SECONDS = 60.0  # for so long it is watched how the server comes back
_OUT_SECONDS, _CLEAN_SECONDS, _LEFT_SECONDS = 10.0, 5.0, 2.0


async def measure(options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Everything, one after the other."""
    network = Network()
    postgres = stack.enter_context(needed_postgres(network.address))
    s3 = stack.enter_context(temporary_s3(network.address))
    os.environ.update(s3.environment)  # before the first server is started
    machines = [network.machine() for _ in range(5)]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f2l-partitions-")))
    hosts = [(machine.name, machine.address) for machine in machines[:3]]
    place = {"store": s3.url, "hurries": False, "answer_seconds": options.answer_s}
    cluster = Cluster(folder, postgres, 3, 0, hosts, **place)
    stack.callback(cluster.end)
    await cluster.until_ready()
    servers = [f"{server.place.host}:{server.place.port}" for server in cluster.servers.values()]
    socket = await asyncio.to_thread(stack.enter_context, proxied(servers, folder))
    visitors = Visitors(cluster, socket, folder)
    near = _worker(cluster, machines[3], "near", 0.05)
    videos = [await visitors.upload() for _ in range(options.videos)]
    await visitors.until_answered([file_id for file_id in videos if file_id is not None])  # now all have it everywhere
    near.kill()
    _worker(cluster, machines[4], "far", 6.0)  # slow enough to be cut off in the middle
    results = {"cut": await _cut(options, cluster, visitors, machines[2], machines[4], near, folder)}
    results["slow"] = await _slow(options, visitors, machines[1])
    results["lost"] = await visitors.until_answered([*visitors.accepted])
    for file_id in [*visitors.accepted]:
        await visitors.delete(file_id)
    seconds, left = await until_nothing_is_left(cluster, 60)
    results |= {"nothing_left_after_s": round(seconds, 2), "left": left}
    results["wrong"] = outcome(visitors.visits, 0, 0)["wrong"]
    # HAProxy asks questions again elsewhere, and nothing else: it cannot know whether the machine had done it.
    results["deletions_without_an_answer"] = results["wrong"].pop("delete: 0", 0)
    await visitors.close()
    return results


def _worker(cluster: Cluster, machine: Machine, name: str, stage_seconds: float) -> Member:
    home = cluster.folder / name
    home.mkdir()
    place = Place(name, home / "home", 0, network=machine.name, stage_seconds=stage_seconds, **cluster.shared)
    cluster.workers[name] = Member(place, work)
    return cluster.workers[name]


async def _cut(
    options: argparse.Namespace,
    cluster: Cluster,
    visitors: Visitors,
    server: Machine,
    worker: Machine,
    near: Member,
    folder: Path,
) -> dict[str, Any]:
    making = await visitors.upload()
    assert making is not None
    while not _rows(cluster, "SELECT 1 FROM jobs WHERE running <> 0"):
        await asyncio.sleep(0.02)
    worker.cut()
    kept = [file_id for file_id in visitors.accepted if file_id != making]
    doomed = kept[: len(kept) // 2]
    adapters = _names(cluster, doomed)
    async with visitors.visiting(0, options.askers):
        await asyncio.sleep(3)
        begin = time.monotonic()
        server.cut()
        await asyncio.to_thread(near.start)
        out = asyncio.create_task(_out(folder / "haproxy.log", begin))
        for file_id in doomed:
            await visitors.delete(file_id)
            await asyncio.sleep(0.2)
        await asyncio.sleep(max(0.0, begin + options.away - time.monotonic()))
        left_before = _leftovers(cluster, adapters)
        server.mend()
        worker.mend()
        end = time.monotonic()
        back = await _back(cluster, adapters, doomed, visitors, end)
    made = await _made(cluster, making)
    found = outcome(visitors.visits, begin, end)
    return {
        "asked": found["ask"],
        "out_after_s": await out,
        "deleted_meanwhile": len(doomed),
        "left_on_it_before": left_before,
        "server_is_back": back,
        "video_of_the_worker": made,
    }


async def _out(log: Path, begin: float) -> float | None:
    """Seconds until HAProxy has put the server out, of both of its lists."""
    while log.read_text().count("/s3 is DOWN") < 2:
        if time.monotonic() > begin + 60:
            return None
        await asyncio.sleep(0.05)
    return round(time.monotonic() - begin, 1)


def _leftovers(cluster: Cluster, adapters: list[str]) -> int:
    """Entries of these adapters on the disk and in the memory of the server that was away."""
    server = cluster.servers[_AWAY]
    folders = (server.place.home / "adapters", server.memory)
    return sum(len(list(folder.glob(f"{name}*"))) for folder in folders for name in adapters)


async def _back(
    cluster: Cluster, adapters: list[str], doomed: list[str], visitors: Visitors, end: float
) -> dict[str, Any]:
    """The server from the moment its link is up: when it answers, when it is ready, and what is left on it then."""
    server, first, ready, early, asked = cluster.servers[_AWAY], None, None, 0, list[int]()
    async with httpx.AsyncClient(timeout=2) as client:
        while time.monotonic() < end + _RETURN_SECONDS:
            with suppress(httpx.TransportError):
                status = (await client.get(f"{server.url}/ready")).status_code
                left = _leftovers(cluster, adapters)
                in_engine = set((await client.get(f"{server.url}/left")).json()).intersection(adapters)
                now = round(time.monotonic() - end, 2)
                first = now if first is None else first
                early += status == 200 and bool(left or in_engine)
                if status == 200 and ready is None:
                    ready = now
                question = {"model": doomed[0], "wait": 0}
                answer = await client.post(f"{server.url}/v1/chat/completions", json=question, headers=visitors.headers)
                asked.append(answer.status_code)
                if ready is not None and not left and not in_engine:
                    break
            await asyncio.sleep(0.02)
        left, in_engine = _leftovers(cluster, adapters), (await client.get(f"{server.url}/left")).json()
    return {
        "answers_after_s": first,
        "ready_after_s": ready,
        "clean_after_s": round(time.monotonic() - end, 2),
        "ready_before_it_was_clean": early,
        "left": left + len(set(in_engine).intersection(adapters)),
        "questions_about_a_deleted_video": {str(status): asked.count(status) for status in set(asked)},
    }


async def _made(cluster: Cluster, file_id: str) -> dict[str, Any]:
    """What became of the video whose worker was cut off, when that worker has had its say.

    Its late result is refused, or there is none, if the store was away from it when it wrote there.
    """
    ((name,),) = _rows(cluster, "SELECT adapter_name FROM files WHERE id = %s", file_id)
    far, root = fsspec.core.url_to_fs(cluster.shared["store"], use_listings_cache=False)
    deadline = time.monotonic() + _RETURN_SECONDS
    while True:
        objects = {path.removeprefix(f"{root}/adapters/").split("/")[0] for path in far.find(f"{root}/adapters")}
        mine = sorted(one for one in objects if one.startswith(name))
        refused = "refused" in cluster.workers["far"].place.log.read_text()
        if (refused and len(mine) == 1) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    rows = _rows(cluster, "SELECT count(*) FROM adapters WHERE name = %s", name)
    return {"adapter_rows": rows[0][0], "copies_in_the_store": len(mine), "late_result_refused": refused}


async def _slow(options: argparse.Namespace, visitors: Visitors, machine: Machine) -> dict[str, Any]:
    begin = time.monotonic()
    machine.delay(options.delay_s)
    async with visitors.visiting(0, options.askers):
        await asyncio.sleep(options.slow)
    end = time.monotonic()
    machine.delay(0.0)
    return {"asked": outcome(visitors.visits, begin, end)["ask"]}


def _names(cluster: Cluster, file_ids: list[str]) -> list[str]:
    return [name for (name,) in _rows(cluster, "SELECT adapter_name FROM files WHERE id = ANY(%s)", file_ids)]


def _rows(cluster: Cluster, query: str, *values: Any) -> list[Any]:
    with psycopg.connect(cluster.shared["database"]) as connection:
        return connection.execute(query, values or None).fetchall()


def faults_of(found: dict[str, Any]) -> list[str]:
    """What of a measurement may not be, in words."""
    cut, back, made = found["cut"], found["cut"]["server_is_back"], found["cut"]["video_of_the_worker"]
    met = {**cut["asked"]["meanwhile"], **found["slow"]["asked"]["meanwhile"]}
    checks = {
        f"questions failed: {met}": all(status[:3] in ("200", "404", "409") for status in met),
        f"wrong answers: {found['wrong']}": not found["wrong"],
        f"the server was out after {cut['out_after_s']} s": (cut["out_after_s"] or 99) <= _OUT_SECONDS,
        f"it was ready before it was clean: {back}": back["ready_before_it_was_clean"] == back["left"] == 0,
        f"it was clean after {back['clean_after_s']} s": back["clean_after_s"] <= _CLEAN_SECONDS,
        f"it answered about a deleted video: {back}": "200" not in back["questions_about_a_deleted_video"],
        f"a video made twice: {made}": made["adapter_rows"] == made["copies_in_the_store"] == 1,
        f"answers about accepted videos are lost: {found['lost']}": found["lost"] == 0,
        f"left: {found['left']}": not found["left"] and found["nothing_left_after_s"] <= _LEFT_SECONDS,
    }
    return [what for what, is_right in checks.items() if not is_right]


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--away", type=float, default=90.0, help="seconds that links are cut")
    parser.add_argument("--slow", type=float, default=20.0, help="seconds that a link is slow")
    parser.add_argument("--delay-s", type=float, default=0.2)
    parser.add_argument("--answer-s", type=float, default=0.2)
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--askers", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    alone()
    with ExitStack() as stack:
        results = asyncio.run(measure(options, stack))
    print(results)
    if options.json is not None:
        configuration = {name: value for name, value in vars(options).items() if name != "json"}
        record.write(options.json, {**configuration, "haproxy": haproxy_version()}, results)
    if wrong := faults_of(results):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
