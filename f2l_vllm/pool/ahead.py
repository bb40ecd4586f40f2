"""The video that comes next is decoded while the models read another one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from f2l_vllm.video.decoder import DecoderStopped
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.sample import SampledVideo

logger = logging.getLogger(__name__)
_STOPPING_SECONDS = 0.05  # between two attempts to stop: the first may come between two requests to the decoder


@dataclass(frozen=True)
class Decoded:
    """A video's frames, and the seconds it took to decode them."""

    frames: SampledVideo
    seconds: float


@dataclass(eq=False)
class _Task:
    video: str
    is_ahead: bool
    is_stopped: bool = False
    future: Future[Decoded | None] = field(default_factory=Future)


class VideoReader:
    """Decodes videos one after the other in a thread, at most one of them before its job begins. Thread-safe.

    No job gets frames or errors of another's video. That a video is bad is kept for its job; whatever else goes wrong
    ahead is forgotten, and the job decodes the video again.

    Args:
        decode: decodes a video, given by its name in the store.
        decode_ahead: the same, or None if that has to wait for the video's own job.
        stop: ends the request that `decode` or `decode_ahead` is in, which raises `DecoderStopped`.
    """

    def __init__(
        self,
        decode: Callable[[str], SampledVideo],
        decode_ahead: Callable[[str], SampledVideo | None],
        stop: Callable[[], None],
    ) -> None:
        self._decode, self._decode_ahead, self._stop_decoder = decode, decode_ahead, stop
        self._thread = ThreadPoolExecutor(1, "decode")
        self._lock = threading.Lock()
        self._ahead: _Task | None = None
        self._own: _Task | None = None  # of the job that waits in `take`
        self._running: _Task | None = None

    def begin(self, video: str) -> None:
        """Decode this video ahead, in place of any other."""
        self.keep([video])
        with self._lock:
            if self._ahead is None:
                self._ahead = self._submit(video, is_ahead=True)

    def keep(self, videos: Collection[str]) -> None:
        """Drop what was or is being decoded ahead, unless it is one of these."""
        with self._lock:
            task = self._ahead
            if task is None or task.video in videos:
                return
            self._ahead = None
        self._end(task)

    def take(self, video: str) -> Decoded:
        """The video's frames, decoded ahead or now. One thread at a time calls it.

        Raises:
            DecoderStopped: `stop` was called for this video.
            Exception: what `decode` raises.
        """
        with self._lock:
            task = self._ahead
            if task is not None and task.video == video:
                self._ahead = None
            else:
                task = self._submit(video, is_ahead=False)
            self._own = task
        try:
            while (decoded := task.future.result()) is None:
                with self._lock:
                    if task.is_stopped:
                        raise DecoderStopped
                    self._own = task = self._submit(video, is_ahead=False)
            return decoded
        finally:
            self._own = None

    def stop(self, video: str) -> None:
        """Have a `take` of this video end."""
        with self._lock:
            task = self._own
        if task is not None and task.video == video:
            self._end(task)

    def _submit(self, video: str, *, is_ahead: bool) -> _Task:
        task = _Task(video, is_ahead)
        self._thread.submit(self._run, task)
        return task

    def _run(self, task: _Task) -> None:
        self._running = task
        try:
            result = self._decoded(task)
        except BaseException as error:  # for whoever takes it
            self._running = None
            if task.is_ahead and not isinstance(error, VideoError | DecoderStopped):
                logger.info("%s could not be decoded ahead: %r", task.video, error)
                task.future.set_result(None)
            else:
                task.future.set_exception(error)
        else:
            self._running = None
            task.future.set_result(result)

    def _decoded(self, task: _Task) -> Decoded | None:
        started = time.perf_counter()
        while not task.is_stopped:
            try:
                frames = (self._decode_ahead if task.is_ahead else self._decode)(task.video)
            except DecoderStopped:
                continue  # it was meant for this one, or came late for the one before
            return None if frames is None else Decoded(frames, time.perf_counter() - started)
        raise DecoderStopped

    def _end(self, task: _Task) -> None:
        task.is_stopped = True
        while not task.future.done():
            if self._running is task:
                self._stop_decoder()
            wait([task.future], _STOPPING_SECONDS)
