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
    from f2l_vllm.pool.ahead import Decoded
    from f2l_vllm.video.sample import SampledVideo

# The internalizer's stages as the catalog's states.
_STATES = {"decode": VideoState.DECODING, "encode": VideoState.ENCODING, "generate": VideoState.ENCODING}

AHEAD_BYTES = 256 << 20  # of frames decoded ahead; 64 frames of 1280x720 pixels are 177 MB

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
        from f2l_vllm.pool.ahead import VideoReader
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
        self._decoding: tuple[str, str] | None = None  # the job whose video is being decoded, and the video
        self._videos = VideoReader(self._decode, self._decode_ahead, self._decoder.stop)

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
        self._videos.keep([video for _, video in jobs])
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
        decoding = self._decoding
        if decoding is not None and decoding[0] == name:
            if self._spec.reading.is_chunked:
                self._decoder.stop()
            else:
                self._videos.stop(decoding[1])

    def look_ahead(self, video: str | None) -> None:
        """Decode this video, whose job comes next, while the models read another; None: drop what was decoded so.

        Chunks of a video are decoded between passes, so then nothing is decoded ahead. Nor is a video that is not here
        yet, or whose frames take more than `AHEAD_BYTES`.
        """
        if video is None:
            self._videos.keep([])
        elif not self._spec.reading.is_chunked:
            self._videos.begin(video)

    def _decode(self, video: str) -> SampledVideo:
        from f2l_vllm.video.sample import sample_video

        one = self._internalizer
        return sample_video(self._store.fetch_video(video), one.processor, one.limits, one.sampling, self._decoder)

    def _decode_ahead(self, video: str) -> SampledVideo | None:
        from f2l_vllm.video.sample import open_source

        path, one = self._store.video_path(video), self._internalizer
        if not path.is_file():
            return None  # what its job fetches is forgotten with the job
        source = open_source(path, one.limits, self._decoder)
        indices = source.indices(one.processor, one.sampling, 0, source.info.frame_count)
        if len(indices) * source.info.width * source.info.height * 3 > AHEAD_BYTES:
            return None
        return source.take(indices, one.sampling)

    def _alone(self, name: str, video: str) -> Iterator[Event]:
        import torch

        from f2l_vllm.video.decoder import DecoderStopped
        from f2l_vllm.video.errors import VideoError

        started = time.perf_counter()
        yield Progress(VideoState.DECODING, 0.0)

        internalizer, path = self._internalizer, self._store.video_path(video)
        decoded: Decoded | None = None  # chunks are decoded between passes

        def run(report: Callable[[str, float], None]) -> Adapter:
            def report_unless_cancelled(stage: str, fraction: float) -> None:
                if name in self._cancelled:
                    raise _GivenUp
                report(stage, fraction)

            if decoded is None:
                return internalizer.internalize(path, on_progress=report_unless_cancelled)
            return internalizer.internalize_frames(decoded.frames, report_unless_cancelled)

        self._decoding = name, video
        try:
            if self._spec.reading.is_chunked:
                self._store.fetch_video(video)
            else:
                if name in self._cancelled:
                    raise _GivenUp
                decoded = self._videos.take(video)
                self._decoding = None
                yield Progress(VideoState.DECODING, 1.0)
            adapter = yield from _events_of(run)
            if decoded is not None:
                adapter.info = adapter.info.decoded_in(decoded.seconds)
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

        started = time.perf_counter()
        internalizer = self._internalizer
        videos: dict[str, Decoded] = {}
        for name, video in jobs:
            yield name, Progress(VideoState.DECODING, 0.0)
            self._decoding = name, video
            path = self._store.video_path(video)
            try:
                decoded = self._videos.take(video)
                internalizer.tokens(decoded.frames)  # refuses a video that is too long, and the others go on
                videos[name] = decoded
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
        for name in videos:
            yield name, Progress(VideoState.ENCODING, 0.0)
        adapters: Sequence[Adapter | None]
        try:
            frames = [decoded.frames for decoded in videos.values()]
            adapters = internalizer.internalize_many(frames, max_tokens=self._spec.batch_tokens)
        except NotEnoughMemoryError as error:
            adapters = error.adapters
        for (name, decoded), adapter in zip(videos.items(), adapters, strict=True):
            if adapter is None:
                yield name, _TOO_LARGE
                continue
            yield name, Progress(VideoState.PUBLISHING, 0.0)
            adapter.info = adapter.info.decoded_in(decoded.seconds)
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
