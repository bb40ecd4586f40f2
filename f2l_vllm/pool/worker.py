"""One hypernetwork worker: a process that loads the frozen encoder and the hypernetwork once and makes adapters."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from f2l_vllm import collector
from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tombstones import LOST
from f2l_vllm.pool.messages import Cancelled, Event, Failed, Outcome, Progress, Published, WorkerInfo, WorkerSpec
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.store import StoreError

if TYPE_CHECKING:
    from f2l_vllm.hypernetwork.adapter import Adapter
    from f2l_vllm.hypernetwork.peft_format import AdapterFiles

# The internalizer's stages as the catalog's states.
_STATES = {"decode": VideoState.DECODING, "encode": VideoState.ENCODING, "generate": VideoState.ENCODING}


_TOO_LARGE = Failed("not_enough_memory", "the worker has not enough memory for this video, even alone")


class _GivenUp(Exception):
    """A job was cancelled in the middle."""


class HypernetworkWorker:
    """Runs as a Ray actor in its own process. One lane of the pool calls `internalize`, one call at a time; it may call
    `info` and `cancel` meanwhile."""

    @collector.paused()
    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        from f2l_vllm.hypernetwork.adapter_check import AdapterCheck
        from f2l_vllm.hypernetwork.internalizer import Internalizer
        from f2l_vllm.pool.device import take_device
        from f2l_vllm.video.decoder import IsolatedDecoder

        torch.set_num_threads(max(1, spec.threads))
        device = take_device(spec.gpus)
        self._spec = spec
        self._store = open_store(spec.home, url=spec.store, reserve_bytes=spec.reserve_bytes)
        self._shapes = BaseShapes.read(spec.model)
        self._internalizer = Internalizer.load(
            spec.model, spec.hypernetwork, device, limits=spec.limits, reading=spec.reading
        )
        self._decoder = self._internalizer.decoder = IsolatedDecoder(spec.decode)
        self._check = AdapterCheck(self._internalizer.model, self._internalizer.processor.tokenizer)
        self._cancelled: set[str] = set()
        self._decoding: str | None = None  # the job whose video is being read

    def info(self) -> WorkerInfo:
        """Describe this worker. An answer also tells the pool that the worker has loaded and is alive."""
        return WorkerInfo(os.getpid(), os.uname().nodename, str(self._internalizer.device))

    def internalize(self, jobs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Event]]:
        """Decode, encode, generate, compose, check and publish. Yields each event with the name of its adapter.

        This is a Ray streaming generator: events reach the pool as they happen. The last event of a job is its
        `Outcome`. Errors that no video causes are raised, and the pool retries the jobs that have not ended.

        Args:
            jobs: adapters' and videos' names in the store; several jobs pass through the models together.
        """
        self._cancelled.clear()
        self._store.check_room_for_adapters()  # first, so that no work is wasted
        if len(jobs) > 1:
            yield from self._together(jobs)
            return
        ((name, video),) = jobs
        for event in self._alone(name, video):
            yield name, event

    def cancel(self, name: str) -> None:
        """Cancel the job of an adapter that nobody waits for any more; it soon ends with `Cancelled`."""
        self._cancelled.add(name)
        if self._decoding == name:
            self._decoder.stop()

    def _alone(self, name: str, video: str) -> Iterator[Event]:
        import torch

        from f2l_vllm.video.decoder import DecoderStopped
        from f2l_vllm.video.errors import VideoError

        started = time.perf_counter()
        yield Progress(VideoState.DECODING, 0.0)

        def run(report: Callable[[str, float], None]) -> Adapter:
            def report_unless_cancelled(stage: str, fraction: float) -> None:
                if name in self._cancelled:
                    raise _GivenUp
                report(stage, fraction)

            return self._internalizer.internalize(path, on_progress=report_unless_cancelled)

        self._decoding = name
        try:
            path = self._store.fetch_video(video)
            adapter = yield from _events_of(run)
        except (_GivenUp, DecoderStopped):
            yield Cancelled()
            return
        except FileNotFoundError:
            _raise_unless_deleted(path)
            yield Cancelled()
            return
        except torch.OutOfMemoryError:  # of a GPU, of which the worker has the same share at each attempt
            yield _TOO_LARGE
            return
        except VideoError as error:
            yield Failed(error.code, str(error))
            return
        except StoreError as error:
            yield Failed(LOST, str(error))
            return
        finally:
            self._decoding = None
        yield Progress(VideoState.PUBLISHING, 0.0)
        yield self._publish(name, adapter, time.perf_counter() - started)

    def _together(self, jobs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Event]]:
        from f2l_vllm.hypernetwork.internalizer import NotEnoughMemoryError
        from f2l_vllm.video.decoder import DecoderStopped
        from f2l_vllm.video.errors import VideoError
        from f2l_vllm.video.sample import SampledVideo, sample_video

        started = time.perf_counter()
        internalizer = self._internalizer
        videos: dict[str, SampledVideo] = {}
        for name, video in jobs:
            yield name, Progress(VideoState.DECODING, 0.0)
            self._decoding = name
            try:
                path = self._store.fetch_video(video)
                sampled = sample_video(
                    path, internalizer.processor, internalizer.limits, internalizer.sampling, self._decoder
                )
                internalizer.tokens(sampled)  # refuses a video that is too long, and the others go on
                videos[name] = sampled
            except DecoderStopped:
                yield name, Cancelled()
            except FileNotFoundError:
                _raise_unless_deleted(path)
                yield name, Cancelled()
            except VideoError as error:
                yield name, Failed(error.code, str(error))
            except StoreError as error:
                yield name, Failed(LOST, str(error))
            finally:
                self._decoding = None
        for name in self._cancelled & videos.keys():
            del videos[name]
            yield name, Cancelled()
        decoded = time.perf_counter()
        for name in videos:
            yield name, Progress(VideoState.ENCODING, 0.0)
        adapters: Sequence[Adapter | None]
        try:
            adapters = internalizer.internalize_many(list(videos.values()), max_tokens=self._spec.batch_tokens)
        except NotEnoughMemoryError as error:
            adapters = error.adapters
        for name, adapter in zip(videos, adapters, strict=True):
            if adapter is None:
                yield name, _TOO_LARGE
                continue
            yield name, Progress(VideoState.PUBLISHING, 0.0)
            adapter.info = adapter.info.decoded_in((decoded - started) / len(jobs))
            yield name, self._publish(name, adapter, time.perf_counter() - started)

    def _publish(self, name: str, adapter: Adapter, seconds: float) -> Outcome:
        from f2l_vllm.hypernetwork.peft_format import validate_adapter

        spec = self._spec
        if name in self._cancelled:
            return Cancelled()
        try:
            finding = self._check.check(adapter)
        except ValueError as error:  # not finite, too large, or without effect
            return Failed("adapter_rejected", f"the generated adapter failed its check: {error}")
        files: AdapterFiles
        info = replace(adapter.info, internalize_seconds=seconds, probe_effect=finding.effect, norm=finding.norm)

        def write(directory: Path) -> Mapping[str, str]:
            nonlocal files
            adapter.save(directory, base_model=spec.base_name, family=self._shapes.family)
            files = validate_adapter(directory, self._shapes, max_rank=spec.max_rank)
            return files.sha256

        try:
            self._store.publish_adapter(name, write, {"base_model": spec.base_name, "info": info.to_json()})
        except ValueError as error:  # not finite, or not of the base model's shape
            return Failed("adapter_rejected", f"the generated adapter failed its checks: {error}")
        return Published(files.rank, files.bytes, info)


def _raise_unless_deleted(path: Path) -> None:
    """Re-raise the error being handled, unless its cause is that the video's own bytes were deleted."""
    if path.exists():
        raise


def _events_of(run: Callable[[Callable[[str, float], None]], Adapter]) -> Generator[Progress, None, Adapter]:
    """Run a function that reports progress by callback as a generator of `Progress`; its result is the return value."""
    events: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
    outcome: list[Adapter] = []
    failure: list[BaseException] = []

    def report(stage: str, fraction: float) -> None:
        if stage in _STATES:
            events.put(Progress(_STATES[stage], fraction))

    def body() -> None:
        try:
            outcome.append(run(report))
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)
        finally:
            events.put(None)

    thread = threading.Thread(target=body, name="internalize")
    thread.start()
    while (event := events.get()) is not None:
        yield event
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
