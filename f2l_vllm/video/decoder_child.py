"""`python -m f2l_vllm.video.decoder_child LIMITS LIFELINE`: the process behind `IsolatedDecoder`.

It ends with its parent, and limits its own memory, CPU time and files before it opens the first video. The answer to a
request is a JSON object on a line: a header, a `shape` followed by that many bytes, or `code` and `message`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any

import numpy as np

from f2l_vllm.lifeline import end_with_writer
from f2l_vllm.video.decode import Timeline, decode_frames, read_stamps, read_timeline, shown
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import Limits, check_file
from f2l_vllm.video.process_limits import allow_cpu, limit_process


class _Videos:
    """Answers requests; remembers the timeline of the last video, because its frames are requested next."""

    def __init__(self, output_bytes: int) -> None:
        self._output_bytes = output_bytes
        self._last: tuple[str, Timeline | None] | None = None

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], memoryview | None]:
        path = request["path"]
        if request["what"] == "probe":
            return asdict(check_file(path, Limits(**request["limits"]))), None
        if request["what"] == "stamps":
            begins, seconds = read_stamps(path, check_file(path, Limits(**request["limits"])))
            return {"begins": begins, "seconds": seconds}, None
        if request["what"] == "open":
            info = check_file(path, Limits(**request["limits"]))
            timeline = read_timeline(path)
            self._last = (path, timeline)
            return asdict(shown(info, timeline)), None
        if request["what"] == "picture":
            from f2l_vllm.video.picture import decode_picture  # few of these processes read pictures

            picture = decode_picture(path, request["max_pixels"], request["background"])[None]
            return {"shape": picture.shape}, np.ascontiguousarray(picture).data.cast("B")
        if self._last is None or self._last[0] != path:
            self._last = (path, read_timeline(path))
        frames = decode_frames(path, request["indices"], request["frame_count"], self._last[1], self._output_bytes)
        return {"shape": frames.shape}, frames.data.cast("B")


def main(limits_json: str, lifeline: int) -> None:
    """Answer requests until standard input or the other end of the pipe `lifeline` closes."""
    end_with_writer(lifeline)
    limits = json.loads(limits_json)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, which closes our input
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that nothing printed can disturb an answer
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    limit_process(limits["memory_bytes"], limits["nice"])
    videos = _Videos(limits["output_bytes"])
    _send(answers, {"ready": True}, None)
    while True:
        request = requests.get()
        allow_cpu(limits["seconds"])
        body = None
        try:
            answer, body = videos.answer(request)
        except VideoError as error:
            answer = {"code": error.code, "message": error.message}
        except MemoryError:
            message = "The video needs more memory to decode than it is given: scale it down or cut it."
            answer = {"code": "video_too_large_to_decode", "message": message}
        except Exception as error:
            message = f"The video cannot be decoded ({type(error).__name__}): convert it to H.264 in an mp4 file."
            answer = {"code": "decode_failed", "message": message}
        _send(answers, answer, body)
        del body  # the frames, which may be of a video that is about to be deleted


def _listen(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass requests on; when the parent is gone, end this process, even in the middle of a video."""
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)


def _send(descriptor: int, answer: dict[str, Any], body: memoryview | None) -> None:
    _write(descriptor, memoryview(json.dumps(answer).encode() + b"\n"))
    if body is not None:
        _write(descriptor, body)


def _write(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
