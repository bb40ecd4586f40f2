"""A hypernetwork worker without models, for tests of what is around it. `install` puts it into a Ray process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.pool.messages import Event, Progress, Published, WorkerInfo, WorkerSpec
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.cached_store import open_store

SECONDS = "FAKE_WORKER_SECONDS"  # variable: what a video takes


class FakeWorker:
    """Publishes a file that says which video it was made from."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._store = open_store(spec.home, url=spec.store)

    def info(self) -> WorkerInfo:
        return WorkerInfo(os.getpid(), os.uname().nodename, "none")

    def cancel(self, name: str) -> None:
        """Goes on: it ends soon."""

    def internalize(self, jobs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Event]]:
        for name, video in jobs:
            yield name, Progress(VideoState.DECODING, 0.0)
            self._store.fetch_video(video)
            time.sleep(float(os.environ[SECONDS]))
            yield name, Progress(VideoState.PUBLISHING, 0.0)

            def write(directory: Path, video: str = video) -> None:
                directory.mkdir()
                (directory / "weights").write_text(video)

            self._store.publish_adapter(name, write, {})
            yield name, Published(8, 100, AdapterInfo())


def install() -> None:
    """What runs first in every process of Ray: see `worker_process_setup_hook` of a runtime environment."""
    from f2l_vllm.pool import actors

    actors.HypernetworkWorker = FakeWorker  # type: ignore[misc,assignment]
