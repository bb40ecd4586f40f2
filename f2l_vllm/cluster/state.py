"""What runs in a cluster, as Ray Serve, the fronts and the engines say it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from f2l_vllm.cluster.local import ClusterFailed
from f2l_vllm.cluster.names import APP, FRONT, WORKERS_APP

_TICK_SECONDS = 0.5
_ASK_SECONDS = 10.0
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_ADAPTERS, _JOBS = "f2l_adapters_resident", "f2l_jobs"


@dataclass(frozen=True)
class EngineState:
    """One engine: its requests, running and waiting, and adapters in its memory; None: it did not answer."""

    url: str
    running: int | None = None
    waiting: int | None = None
    adapters: int | None = None


@dataclass(frozen=True)
class State:
    """`replicas`: of each deployment, how many in which state; `videos`: how many wait for a worker or are in work;
    `metrics`: where Ray's nodes tell Prometheus of themselves and of Serve."""

    replicas: dict[str, dict[str, int]]
    metrics: list[str]
    engines: dict[str, EngineState] = field(default_factory=dict)
    videos: int = 0


def connect(address: str) -> None:
    """Join a Ray cluster as a client of it; call `ray.shutdown` afterwards.

    Raises:
        ClusterFailed: nobody answers there.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the rest is for whoever runs Serve
    try:
        ray.init(address=address, namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        why = error.__cause__ or error
        raise ClusterFailed(f"no Ray cluster answers at {address}: {why}") from error


def disconnect() -> None:
    """Leave the Ray cluster; what runs there goes on."""
    ray.shutdown()


def end() -> None:
    """Take this package's applications out of Serve. It returns when their answers and their servers have ended."""
    for name in (APP, WORKERS_APP):
        if name in serve.status().applications:
            serve.delete(name)


def wait_running(seconds: float) -> None:
    """Return when every application runs.

    Raises:
        ClusterFailed: one of them failed, or the time is over.
    """
    until = time.monotonic() + seconds
    while True:
        found = serve.status().applications
        left = {name: one for name, one in found.items() if one.status is not ApplicationStatus.RUNNING}
        if found and not left:
            return
        text = "; ".join(f"{name}: {one.message or one.status.value}" for name, one in left.items())
        if any(one.status is ApplicationStatus.DEPLOY_FAILED for one in left.values()):
            raise ClusterFailed(f"not deployed: {text}")
        if time.monotonic() > until:
            raise ClusterFailed(f"not ready after {seconds:g} s: {text}")
        time.sleep(_TICK_SECONDS)


def engines() -> dict[str, str]:
    """The engines that a front knows of: name -> URL."""
    found: dict[str, dict[str, str]] = (
        serve.get_deployment_handle(FRONT, APP).engines.remote().result(timeout_s=_ASK_SECONDS)
    )
    return {name: one["url"] for name, one in found.items()}


def state() -> State:
    """What runs now."""
    replicas = {
        deployment: {str(kind): count for kind, count in one.replica_states.items()}
        for application in serve.status().applications.values()
        for deployment, one in application.deployments.items()
    }
    nodes = [node for node in ray.nodes() if node["Alive"]]
    metrics = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    if not replicas.get(FRONT, {}).get("RUNNING"):
        return State(replicas, metrics)
    urls = engines()
    pages = {name: _figures(url) for name, url in urls.items()}
    found = {
        name: EngineState(urls[name], page.get(_RUNNING), page.get(_WAITING), page.get(_ADAPTERS))
        for name, page in pages.items()
    }
    return State(replicas, metrics, found, sum(page.get(_JOBS, 0) for page in pages.values()))


def _figures(url: str) -> dict[str, int]:
    """Sums over the labels of each metric; empty if the engine does not answer."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=_ASK_SECONDS).text
    except httpx.HTTPError:
        return {}
    sums: Counter[str] = Counter()
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if not line.startswith("#") and name.partition("{")[0] in (_RUNNING, _WAITING, _ADAPTERS, _JOBS):
            sums[name.partition("{")[0]] += round(float(value))
    return dict(sums)
