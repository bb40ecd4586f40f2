"""`python -m f2l_vllm.video.pull_child OPTIONS LIFELINE`: the process behind `Puller`.

It ends with its parent, and limits its own memory, CPU time and files before it reads the source: standard input, or an
RTSP or SRT server. What it says are lines of JSON: `connected`; `segment` with its size in bytes, which follow; and at
the end `code` and `message`, or `finished`, which says whether the source is at its end.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import av
import av.logging

from f2l_vllm.lifeline import end_with_writer
from f2l_vllm.video.cutting import Clock, Cut, Cutter, video_packets
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import unreachable
from f2l_vllm.video.process_limits import allow_cpu, limit_process
from f2l_vllm.video.rtsp_relay import RtspRelay

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Streams without a header are looked at this long before it is known what is in them.
_PROBING = {"analyzeduration": "1000000", "probesize": "1000000"}


def main(options_json: str, lifeline: int) -> None:
    """Read the source until it ends, this process is killed, or the other end of the pipe `lifeline` closes."""
    end_with_writer(lifeline)
    options = json.loads(options_json)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that nothing printed can disturb an answer
    av.logging.set_level(None)
    limit_process(options["memory_bytes"], options["nice"])
    allow_cpu(options["cpu_seconds"])

    def emit(cut: Cut) -> None:
        allow_cpu(options["cpu_seconds"])
        said = asdict(cut)
        data = said.pop("data")
        _send(answers, {"segment": len(data), **said}, data)

    try:
        finished = _read(options, emit, lambda: _send(answers, {"connected": True}))
        _send(answers, {"finished": finished})
    except VideoError as error:
        _send(answers, {"code": error.code, "message": error.message})
    except MemoryError:
        message = "Reading the stream needs more memory than it is given: send a smaller one."
        _send(answers, {"code": "decode_failed", "message": message})
    os._exit(0)  # threads and a hanging source are not waited for


def _read(options: dict[str, Any], emit: Callable[[Cut], None], connected: Callable[[], None]) -> bool:
    source = options["source"]
    relay = None
    timeout = (options["open_seconds"], options["read_seconds"])
    cutter: Cutter | None = None
    try:
        if source["kind"] == "rtsp":
            tls_name = source["host"] if source["tls"] else None
            relay = RtspRelay(source["addresses"], source["port"], tls_name, options["read_seconds"])
            settings = {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtp,tcp", **_PROBING}
            settings["allowed_media_types"] = "video+data"  # data: MPEG-TS
            address = source["address"].replace("PORT", str(relay.port), 1)
            container = av.open(address, format="rtsp", options=settings, timeout=timeout)
        elif source["kind"] == "srt":
            container = av.open(_srt(source, options["read_seconds"]), format="mpegts", options=_PROBING)
        else:
            container = av.open(io.FileIO(0), format=source["format"], options=_PROBING)
        for stream, packet in video_packets(container):
            if cutter is None:
                connected()
                cutter = Cutter(
                    stream,
                    Clock(**options["clock"]),
                    seconds=options["seconds"],
                    longest=options["longest"],
                    largest=options["segment_bytes"],
                    repeat_headers=source["kind"] == "rtsp",
                    emit=emit,
                )
            cutter.add(packet)
    except (OSError, ValueError) as error:  # what PyAV raises are such
        if cutter is not None:
            cutter.close()
        if relay is not None and relay.finished:
            return True
        why = relay.why if relay is not None else str(error) or type(error).__name__
        raise unreachable(source["host"], why) from error
    if cutter is not None:
        cutter.close()
    if relay is not None and not relay.finished:
        raise unreachable(source["host"], relay.why)
    return source["kind"] != "srt"  # its end is a sender's, which may come back


def _srt(source: dict[str, Any], seconds: float) -> Any:
    """What a program that knows SRT reads there; it has this process's limits, and ends with it."""
    process = subprocess.Popen(
        [
            *(source["program"], "-nostdin", "-loglevel", "quiet", "-protocol_whitelist", "srt,udp,pipe"),
            *("-analyzeduration", _PROBING["analyzeduration"], "-probesize", _PROBING["probesize"]),
            *("-timeout", str(round(seconds * 1e6)), "-f", "mpegts", "-i", source["address"]),
            *("-map", "0:v:0", "-c", "copy", "-copyts", "-f", "mpegts", "-muxdelay", "0", "-mpegts_copyts", "1"),
            "pipe:1",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        bufsize=0,
        preexec_fn=_end_with_parent,
    )
    return process.stdout


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _send(descriptor: int, answer: dict[str, Any], body: bytes = b"") -> None:
    for part in (json.dumps(answer).encode() + b"\n", body):
        view = memoryview(part)
        while view:
            view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
