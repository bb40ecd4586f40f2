"""Decoding in a process of its own: a file of unknown origin can crash, hang or exhaust that process, but no other.

The process is started once and reads many videos; it limits its own memory and CPU time, and is replaced when it fails.
Requests are lines of JSON on its standard input; an answer is a line of JSON, followed by the frames' bytes. A
`multiprocessing.connection` cannot read them: it has no deadline once a message has begun, and into an array it reads
all that the message claims to hold before it looks at the array's size.
"""

from __future__ import annotations

import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from f2l_vllm.video.errors import CODES, VideoError
from f2l_vllm.video.probe import Limits, VideoInfo

_START_SECONDS = 60.0
_LONGEST_LINE = 1 << 16
Shrink = Callable[[np.ndarray], np.ndarray]
_ATTEMPTS = 2  # a process that is killed from outside is replaced once


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of one video.

    Attributes:
        memory_bytes: address space of the decoding process.
        seconds: CPU seconds of one request; its wall time may be twice as long, for busy machines.
        output_bytes: of all decoded frames, as RGB.
        nice: how much the process gives way to others, 0 to 19.
    """

    memory_bytes: int = 4 << 30
    seconds: float = 300.0
    output_bytes: int = 2 << 30
    nice: int = 0

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "seconds", "output_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DecodeLimits.{name} must be positive, got {getattr(self, name)!r}.")


class Decoder(Protocol):
    """Reads headers and frames of video files, in any process."""

    def open(self, path: str | Path, limits: Limits) -> VideoInfo:
        """The checked header, with frames and duration as they are shown."""

    def frames(self, path: str | Path, indices: Sequence[int], frame_count: int) -> np.ndarray:
        """uint8 [len(indices), H, W, 3], as `decode_frames` returns them."""


class DecoderStopped(Exception):
    """`stop` was called during the request."""


class _Died(Exception):
    """The process ended, by itself or by a signal."""


class IsolatedDecoder:
    """A `Decoder` in a process of its own. Requests come from one thread at a time; `stop` from any."""

    def __init__(self, limits: DecodeLimits | None = None) -> None:
        self._limits = limits or DecodeLimits()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._busy = self._stopped = False

    def probe(self, path: str | Path, limits: Limits) -> VideoInfo:
        """The checked header; reads no more of the file than necessary.

        Raises:
            VideoError: as `open`.
        """
        return VideoInfo(**self._ask("probe", path, limits=asdict(limits)))

    def open(self, path: str | Path, limits: Limits) -> VideoInfo:
        """The checked header, with frames and duration as they are shown.

        Raises:
            VideoError: what `open_source` raises, `decode_failed` or `video_too_large_to_decode`.
            FileNotFoundError: no such file.
            DecoderStopped: `stop` was called.
        """
        return VideoInfo(**self._ask("open", path, limits=asdict(limits)))

    def stamps(self, path: str | Path, limits: Limits) -> tuple[float, float]:
        """Check the header; the first frame's timestamp and how long the frames last, both in seconds.

        Raises:
            VideoError: as `open`.
        """
        answer = self._ask("stamps", path, limits=asdict(limits))
        begins, seconds = float(answer["begins"]), float(answer["seconds"])
        if not (math.isfinite(begins) and 0 < seconds < math.inf):
            raise VideoError("no_frames", "The segment's timestamps make no sense: check what writes it.")
        return begins, seconds

    def frames(
        self, path: str | Path, indices: Sequence[int], frame_count: int, shrink: Shrink | None = None
    ) -> np.ndarray:
        """Decode the frames at ascending `indices`: uint8 [len(indices), H, W, 3].

        Args:
            path, indices, frame_count: as for `decode_frames`.
            shrink: makes each frame smaller, [1, H, W, 3] to [1, H, W, 3], so that this process never holds all frames
                in their full size.

        Raises:
            VideoError: what `decode_frames` raises, `decode_failed` or `video_too_large_to_decode`.
            FileNotFoundError: no such file.
            DecoderStopped: `stop` was called.
        """
        places = [int(index) for index in indices]
        frames: np.ndarray = self._ask("frames", path, shrink, indices=places, frame_count=frame_count)
        return frames

    def picture(self, path: str | Path, max_pixels: int, background: Sequence[int]) -> np.ndarray:
        """Decode a picture: uint8 [H, W, 3], as `decode_picture` returns it.

        Raises:
            VideoError: what `decode_picture` raises, `decode_failed` or `video_too_large_to_decode`.
            FileNotFoundError, DecoderStopped: as `frames`.
        """
        picture: np.ndarray = self._ask(
            "picture", path, max_pixels=max_pixels, background=list(background), indices=[0]
        )
        return picture[0]

    def stop(self) -> None:
        """End the current request, if any; it raises `DecoderStopped`."""
        if self._busy:
            self._stopped = True
            self._kill()

    def close(self) -> None:
        """End the process; the next request starts another."""
        self._kill()

    def _ask(self, what: str, path: str | Path, shrink: Shrink | None = None, **arguments: Any) -> Any:
        if not Path(path).exists():
            raise FileNotFoundError(path)
        self._busy, self._stopped = True, False
        try:
            return self._ask_process({"what": what, "path": os.fspath(path), **arguments}, shrink)
        except VideoError as error:
            if not Path(path).exists():  # deleted before the process opened it: the video is not at fault
                raise FileNotFoundError(path) from error
            raise
        finally:
            self._busy = False

    def _ask_process(self, request: dict[str, Any], shrink: Shrink | None) -> Any:
        for attempt in range(_ATTEMPTS):
            try:
                process = self._running()
                deadline = time.monotonic() + 2 * self._limits.seconds
                try:
                    _write(process, request)
                    return self._answer(process, deadline, request.get("indices"), shrink)
                except BrokenPipeError as error:
                    raise _Died from error
            except _Died as error:
                code = self._end()
                if self._stopped:
                    raise DecoderStopped from error
                if code == -signal.SIGKILL and attempt + 1 < _ATTEMPTS:
                    continue  # killed from outside: a new process may succeed
                if code == -signal.SIGXCPU:
                    raise self._took_too_long() from error
                raise VideoError(
                    "decode_failed",
                    f"The decoder ended over the video ({_how(code)}): convert it to H.264 in an mp4 file.",
                ) from error
            except BaseException as error:
                if not isinstance(error, VideoError) or error.code == "video_too_large_to_decode":
                    self._end()  # it is in the middle of an answer, or its memory is fragmented
                raise
        raise AssertionError("unreachable")

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return self._process
        self._end()  # it ended while it had nothing to do
        with self._lock:
            # glibc reserves address space for every thread that allocates, and BLAS for every core.
            environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1"}
            theirs, ours = os.pipe()
            self._lifeline = open(ours, "wb", buffering=0)  # noqa: SIM115  (nothing is written; see `lifeline`)
            limits = json.dumps(asdict(self._limits))
            try:
                process = self._process = subprocess.Popen(
                    [sys.executable, "-m", "f2l_vllm.video.decoder_child", limits, str(theirs)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs],
                    env=environment,
                )
            finally:
                os.close(theirs)
        try:
            _read_line(process, time.monotonic() + _START_SECONDS)
        except (_Died, TimeoutError) as error:
            code = self._end()
            if self._stopped:
                raise DecoderStopped from error
            raise RuntimeError(f"the decoding process did not start ({_how(code)})") from error
        return process

    def _answer(
        self, process: subprocess.Popen[bytes], deadline: float, indices: Sequence[int] | None, shrink: Shrink | None
    ) -> Any:
        try:
            answer = json.loads(_read_line(process, deadline))
            if "code" in answer:
                assert answer["code"] in CODES
                raise VideoError(answer["code"], str(answer["message"]))
            if indices is None:
                return answer
            shape = [int(size) for size in answer["shape"]]
            if len(shape) != 4 or shape[0] != len(indices) or shape[3] != 3 or min(shape) <= 0:
                raise ValueError(f"frames of shape {shape}")
            if np.prod(shape, dtype=object) > self._limits.output_bytes:
                raise ValueError("more bytes than were asked for")
            if shrink is None:
                return _read_frames(process, shape, deadline)
            one = [1, *shape[1:]]
            return np.concatenate([shrink(_read_frames(process, one, deadline)) for _ in indices])
        except TimeoutError as error:
            raise self._took_too_long() from error
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            # Only a decoder that a video has taken over gives such an answer.
            self._end()
            message = "The decoder did not answer in its own language: convert the video to H.264 in an mp4 file."
            raise VideoError("decode_failed", message) from error

    def _took_too_long(self) -> VideoError:
        return VideoError(
            "video_too_large_to_decode",
            f"The video takes longer to decode than the {self._limits.seconds:g} s it may: scale it down or cut it.",
        )

    def _kill(self) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.kill()

    def _end(self) -> int:
        """Kill the process unless it has ended already; returns its exit code."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return -signal.SIGKILL
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        try:
            return process.wait(0.5)  # a process that died needs a moment until it can be reaped
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            self._lifeline.close()


class Decoders:
    """A few decoders, each lent to one user at a time; the most recently used one is lent first."""

    def __init__(self, count: int, limits: DecodeLimits) -> None:
        self._idle: queue.LifoQueue[IsolatedDecoder] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(IsolatedDecoder(limits))

    @contextmanager
    def lend(self) -> Iterator[IsolatedDecoder]:
        """Wait for a free decoder; the caller has it alone."""
        decoder = self._idle.get()
        try:
            yield decoder
        finally:
            self._idle.put(decoder)


def _write(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """A line of an answer, read byte by byte because the bytes after it are not JSON."""
    line = bytearray(1)
    view, length = memoryview(bytearray(_LONGEST_LINE)), 0
    while not length or view[length - 1] != ord("\n"):
        if length == len(view):
            raise ValueError("a line without an end")
        _read_into(process, memoryview(line), deadline)
        view[length] = line[0]
        length += 1
    return bytes(view[:length])


def _read_into(process: subprocess.Popen[bytes], view: memoryview, deadline: float) -> None:
    assert process.stdout is not None
    descriptor, filled = process.stdout.fileno(), 0
    while filled < len(view):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        count = os.readv(descriptor, [view[filled:]])
        if count == 0:
            raise _Died
        filled += count


def _read_frames(process: subprocess.Popen[bytes], shape: list[int], deadline: float) -> np.ndarray:
    frames = np.empty(shape, np.uint8)
    _read_into(process, frames.data.cast("B"), deadline)
    return frames


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
