"""A cluster on this machine, started and stopped by a command: a Ray node of its own, and the config that Serve runs.

What one command starts another one finds by a file in the data folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from f2l_vllm.cluster.names import APP, ENGINE, FRONT, WORKERS_APP
from f2l_vllm.files import write_whole
from f2l_vllm.lifeline import end_session
from f2l_vllm.server_process import LOOPBACK, free_port

_FILE = "cluster.json"  # in the data folder
_START_SECONDS = 120.0
_CPUS = 1000  # Ray counts them, and nobody else shares this node: what runs at a time is for the operator to say
_DRAIN_SECONDS = "2"
_ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}  # a front never blocks: a third less CPU per token


class ClusterFailed(RuntimeError):
    """Ray, or an application in it, did not start; the message says why."""


@dataclass(frozen=True)
class Node:
    """A Ray node of this machine: its first process, its address, and its folder for sessions and logs."""

    pid: int
    address: str
    folder: str

    @classmethod
    def find(cls, home: Path) -> Node | None:
        """The one that was started for this data folder, if it runs."""
        try:
            node = cls(**json.loads((home / _FILE).read_text()))
            command = Path(f"/proc/{node.pid}/cmdline").read_text()
        except (OSError, ValueError, TypeError):
            return None
        return node if node.folder in command else None

    @classmethod
    def start(cls, home: Path, environment: Mapping[str, str]) -> Node:
        """Start one that belongs to this data folder, with these variables for all that runs in it.

        Raises:
            ClusterFailed: it did not start.
        """
        folder = tempfile.mkdtemp(prefix="f2l-ray-", dir="/tmp")  # short: Ray's and HAProxy's sockets lie in it
        address = f"{LOOPBACK}:{free_port()}"
        ports = {"port": address.rpartition(":")[2], "ray-client-server-port": free_port()}
        ports |= {"dashboard-agent-listen-port": free_port()}
        flags = [f"--{name}={value}" for name, value in {**ports, "num-cpus": _CPUS, "temp-dir": folder}.items()]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
        log = Path(folder) / "ray.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*ray, *flags],
                env={**os.environ, **environment, **haproxy_files(folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = cls(process.pid, address, folder)
        until = time.monotonic() + _START_SECONDS
        while "--block" not in (said := log.read_text(errors="replace")):  # said when the node runs
            if process.poll() is not None or time.monotonic() > until:
                node.stop(home)
                raise ClusterFailed(f"Ray did not start:\n{said[-2000:]}")
            time.sleep(0.1)
        write_whole(home / _FILE, json.dumps(asdict(node)))
        return node

    def stop(self, home: Path) -> None:
        """Kill every process of the node; ask Serve to end its applications first."""
        end_session(self.pid)
        (home / _FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def environment(home: Path, host: str) -> dict[str, str]:
    """Variables for a node of its own, and for whoever talks to it; those that are set already stay.

    HAProxy stands in front of the fronts, as Ray documents it, unless only this machine is served: with HAProxy fronts
    listen on every address.
    """
    home.mkdir(parents=True, exist_ok=True)
    usual = {
        "F2L_HOME": str(home),
        "F2L_DATABASE_URL": f"sqlite:///{home / 'catalog.sqlite3'}",
        "F2L_STORE": f"file://{home / 'store'}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nobody joins: all of Ray listens on loopback
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(host != LOOPBACK)),
        # A front that was killed: another one is asked, also if the request came in two pieces, as httpx sends it. Ray
        # has no setting for the second line, and writes the value into HAProxy's configuration as it stands.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response\n    option http-buffer-request",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # of a request that is asked again elsewhere
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": _DRAIN_SECONDS,
    }
    return {name: os.environ.get(name, value) for name, value in usual.items()}


def haproxy_files(folder: str) -> dict[str, str]:
    """Variables that keep the files of Serve's HAProxy here, each node's in a folder named by 56 digits."""
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
    }


def config(
    model: str, flags: Sequence[str], *, engines: int, fronts: int, workers: int, host: str, port: int, gpus: int = 0
) -> dict[str, Any]:
    """A Serve config, as launch/cluster.yaml, for one machine.

    Args:
        flags: for each engine's server.
        workers: hypernetwork workers at most; they come with videos that wait. 0: there are none.
        gpus: for each engine.
    """
    few = {"num_cpus": 0}
    front = {**few, "runtime_env": {"env_vars": _ONE_LOOP}}
    engine = {"name": ENGINE, "num_replicas": engines, "ray_actor_options": {**few, "num_gpus": gpus}}
    served: dict[str, Any] = {
        "name": APP,
        "route_prefix": "/",
        "import_path": "f2l_vllm.cluster.app:build",
        "args": {"model": model, "flags": list(flags)},
        "deployments": [{"name": FRONT, "num_replicas": fronts, "ray_actor_options": front}, engine],
    }
    made = {
        "name": WORKERS_APP,
        "route_prefix": None,
        "import_path": "f2l_vllm.cluster.workers:build",
        "args": {"model": model, "most": workers},
    }
    return {"http_options": {"host": host, "port": port}, "applications": [served, *([made] if workers else [])]}


def deploy(config: Mapping[str, Any], address: str, environment: Mapping[str, str]) -> None:
    """Hand a Serve config to a Ray cluster. It returns before the applications run.

    Raises:
        ClusterFailed: Serve did not take it.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(config), file)
        file.flush()
        serve = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", address, file.name]
        ran = subprocess.run(serve, env={**os.environ, **environment}, capture_output=True, text=True)
    if ran.returncode:
        raise ClusterFailed(f"Serve did not take the config:\n{(ran.stdout + ran.stderr)[-2000:]}")
