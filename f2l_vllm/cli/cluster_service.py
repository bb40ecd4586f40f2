"""The service of one data folder or one Ray cluster, as commands start it, ask it and stop it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from f2l_vllm.server_process import LOOPBACK, url_of

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)


def start(wanted: dict[str, Any], home: Path, address: str | None, seconds: float) -> str:
    """Run a Serve config, by a Ray node of this machine's own if there is no address, and wait; the service's URL.

    Raises:
        ClusterFailed: it did not become ready; what was started is stopped.
    """
    from f2l_vllm.cli.progress import status
    from f2l_vllm.cluster import local

    options = wanted.get("http_options", {})
    host = options.get("host", "127.0.0.1")
    variables: dict[str, str] = {} if address else local.environment(home, host)
    if address is None and local.Node.find(home) is not None:
        raise local.ClusterFailed(f"a cluster of {home} runs: f2l-vllm cluster down stops it")
    os.environ.update(variables)  # Ray reads some when it is imported
    node = None
    try:
        if address is None:
            with status(console, "starting Ray"):
                node = local.Node.start(home, variables)
                address = node.address
        with status(console, "starting fronts and engines, which load their models"):
            local.deploy(wanted, address, variables)
            with connected(address):
                from f2l_vllm.cluster.state import wait_running

                wait_running(seconds)
    except BaseException:
        if node is not None:
            node.stop(home)
        raise
    return url_of(LOOPBACK if host == "0.0.0.0" else host, options.get("port", 8000))


def stop(address: str, home: Path) -> None:
    """Stop the service, and the Ray node of this data folder if it is the one at this address.

    Raises:
        ClusterFailed: nobody answers there.
    """
    from f2l_vllm.cluster.local import Node

    node = Node.find(home)
    try:
        with connected(address):
            from f2l_vllm.cluster.state import end

            end()
    finally:
        if node is not None and node.address == address:
            node.stop(home)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """As a client of the Ray cluster at this address.

    Raises:
        ClusterFailed: nobody answers there.
    """
    from f2l_vllm.cluster.state import connect, disconnect

    connect(address)
    try:
        yield
    finally:
        disconnect()
