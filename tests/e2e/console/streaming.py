"""A sender of live video."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import httpx

from f2l_vllm import torch_shims

torch_shims.install()

from f2l_vllm.synthetic.render import write_mp4  # noqa: E402
from f2l_vllm.synthetic.world import sample_scenes  # noqa: E402

SECONDS = 2  # of a segment
_TRIES = 10


def segments(folder: Path, count: int) -> list[Path]:
    """MPEG-TS segments that follow each other, each of another scene."""
    made = []
    for place, scene in enumerate(sample_scenes(count, seed=17, split="held-out")):
        film = write_mp4(scene, folder / f"{place}.mp4", seconds=SECONDS)
        target = film.with_suffix(".ts")
        options = ["-c", "copy", "-output_ts_offset", str(SECONDS * place), "-muxdelay", "0", "-f", "mpegts"]
        subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", film, *options, target], check=True)
        made.append(target)
    return made


def push(url: str, key: str, stream: str, segment: Path) -> None:
    """Put a segment, as senders of HLS do; again while the server is busy."""
    address = f"{url}/v1/streams/{stream}/push/{segment.name}"
    headers = {"Authorization": f"Bearer {key}"}
    for _ in range(_TRIES):
        answer = httpx.put(address, content=segment.read_bytes(), headers=headers, timeout=60)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(float(answer.headers["Retry-After"]))
    assert answer.is_success, answer.text
