"""A Ray cluster on machines of their own: network namespaces, each with a raylet, a folder and a supervisor."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from benchmarks.namespaces import Machine, Network
from f2l_vllm.cluster.local import haproxy_files
from f2l_vllm.lifeline import end_session

ROOT = Path(__file__).parents[1]
_PORT = 6379
_START_SECONDS = 120.0
_AGAIN_SECONDS = 5  # systemd's RestartSec and the first back-off of Kubernetes are of this size
_OWN_FOLDER = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
_SUPERVISED = 'while :; do "$@"; sleep ' + f"{_AGAIN_SECONDS}; done"


class RayMachines:
    """Ray's head at the bridge, and machines that join it.

    Args:
        folder: of this cluster. Machines see a folder of their own in its place.
        environment: variables for all of Ray; those of `launch/kubernetes/rayservice.yaml` are added.
        head: flags for `ray start` of the head.
    """

    def __init__(self, network: Network, folder: Path, environment: Mapping[str, str], head: list[str]) -> None:
        self._network, self._folder = network, folder
        self.address = f"{network.address}:{_PORT}"
        self.environment = {
            **shipped_settings(),
            **environment,
            **haproxy_files(str(folder)),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.machines: list[RayMachine] = []
        self._started: list[int] = []
        # HAProxy's sockets lie in the folder, and take no long path.
        flags = ["--head", f"--port={_PORT}", f"--temp-dir={folder}", "--include-dashboard=false"]
        self._start(_ray(network.address, *flags, *head), "head")

    def join(self, *flags: str) -> RayMachine:
        """One more machine. It is there when Ray says so."""
        machine = self._network.machine()
        own = Path(f"{self._folder}-{machine.name}")
        own.mkdir()
        inside = ["ip", "netns", "exec", machine.name, "unshare", "--mount", "sh", "-c", _OWN_FOLDER, "sh"]
        supervised = ["sh", "-c", _SUPERVISED, "sh", *_ray(machine.address, f"--address={self.address}", *flags)]
        self._start([*inside, str(own), str(self._folder), *supervised], machine.name)
        self.machines.append(RayMachine(machine))
        return self.machines[-1]

    def end(self) -> None:
        """Kill all of Ray, and what runs in it."""
        for leader in reversed(self._started):
            end_session(leader)

    def at(self, url: str) -> RayMachine:
        """The machine of an engine."""
        return next(one for one in self.machines if f"//{one.machine.address}:" in url)

    def find(self, *words: str) -> int:
        """The process, anywhere, whose command line has all of these words."""
        return _find(_commands(int(one.name) for one in Path("/proc").glob("[0-9]*")), words)

    def said(self) -> str:
        """The ends of the logs of all `ray start`."""
        return "\n".join(f"{log}:\n{log.read_text()[-1000:]}" for log in self._folder.parent.glob("ray-*.log"))

    def _start(self, command: list[str], name: str) -> None:
        path = self._folder.parent / f"ray-{name}.log"
        environment = {**os.environ, **self.environment}
        with path.open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process.pid)
        deadline = time.monotonic() + _START_SECONDS
        while "--block" not in path.read_text(errors="replace"):  # said when the node runs
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start:\n{self.said()}")
            time.sleep(0.2)


class RayMachine:
    """One machine of a Ray cluster. Its supervisor starts Ray again when it has ended."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def find(self, *words: str) -> int:
        """The process whose command line has all of these words."""
        listed = subprocess.run(["ip", "netns", "pids", self.machine.name], capture_output=True, text=True, check=True)
        return _find(_commands(map(int, listed.stdout.split())), words)


def shipped_settings() -> dict[str, str]:
    """Ray's own variables in `launch/kubernetes/rayservice.yaml`, those of its head."""
    (service, *_) = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "rayservice.yaml").read_text())
    (head,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    return {one["name"]: one["value"] for one in head["env"] if one["name"].startswith("RAY_")}


def _ray(address: str, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
    return [*command, f"--object-store-memory={100 << 20}", *flags]


def _commands(pids: Iterable[int]) -> Iterator[tuple[int, str]]:
    for pid in pids:
        with suppress(OSError):  # it has ended
            yield pid, Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def _find(commands: Iterable[tuple[int, str]], words: Collection[str]) -> int:
    return next(pid for pid, command in commands if all(word in command for word in words))
