"""A real S3 server, moto's, with an empty bucket. It keeps objects in memory: it can be paused, but not restarted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from f2l_vllm.server_process import free_port

_START_SECONDS = 60.0


def environment(endpoint: str) -> dict[str, str]:
    """For whoever uses a store at this address."""
    keys = {"AWS_ACCESS_KEY_ID": "f2l", "AWS_SECRET_ACCESS_KEY": "f2l", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys}


class S3:
    """`url` is for `F2L_STORE`, with `environment` for whoever uses it."""

    url = "s3://f2l/videos"

    def __init__(self, address: str) -> None:
        program = shutil.which("moto_server", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if program is None:
            raise RuntimeError("an S3 server is needed: pip install -e '.[test]' brings moto_server")
        port = free_port(address)
        endpoint = f"http://{address}:{port}"
        self.environment = environment(endpoint)
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen([program, "-H", address, "-p", str(port)], stdout=quiet, stderr=quiet)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                httpx.put(f"{endpoint}/f2l").raise_for_status()
                return
            except httpx.TransportError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("moto_server did not start") from None
            time.sleep(0.1)

    def pause(self) -> None:
        """Answer nobody, and keep what is sent."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `pause`."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextmanager
def temporary_s3(address: str = "127.0.0.1") -> Iterator[S3]:
    """A server for a while."""
    s3 = S3(address)
    try:
        yield s3
    finally:
        s3.close()
