"""The compared ways to answer: what each asks of a server, and how that server is started."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Frames that a server has seen before cost it less; it keeps nothing unless the arm measures exactly that.
_NOTHING_KEPT = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")
# vLLM caches prefixes by whole blocks, so every question reads the end of the video anew. For that, vLLM encodes the
# whole video again unless its encoder cache holds it; that cache holds as many tokens as a step.
_KEPT = "{kept_tokens}"
_ALL_KEPT = ("--enable-prefix-caching", "--max-num-batched-tokens", _KEPT)
_MERGE = "{merge_rate}"


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        reads: what a question is answered from; `text`: from itself alone, as a model without videos would.
        cold: its question is the first about the video and waits for the upload and the internalization.
        warmed: another question about the video is answered before, so that the server has the video's KV.
        flags, env: of its server; `{merge_rate}` stands for the suite's, `{kept_tokens}` for the tokens of all videos
            whose KV the server is to keep.
        workers: its server internalizes.
    """

    name: str
    reads: Literal["adapter", "frames", "text"]
    cold: bool = False
    warmed: bool = False
    flags: tuple[str, ...] = _NOTHING_KEPT
    env: tuple[tuple[str, str], ...] = ()
    workers: bool = True

    @property
    def anywhere(self) -> bool:
        """Whether it can be measured at a server that was started for something else."""
        return self.flags == _NOTHING_KEPT and not self.env

    @property
    def merges(self) -> bool:
        """Whether visual tokens are merged, in its prompts or before the hypernetwork reads them."""
        return any(_MERGE in word for word in (*self.flags, *dict(self.env).values()))

    def server(self, merge_rate: float, kept_tokens: int) -> ServerKind:
        """The server that the arm needs."""

        def filled(word: str) -> str:
            return word.replace(_MERGE, f"{merge_rate:g}").replace(_KEPT, str(kept_tokens))

        env = tuple((name, filled(value)) for name, value in self.env)
        return ServerKind(tuple(map(filled, self.flags)), env, self.workers)


@dataclass(frozen=True)
class ServerKind:
    """How a server is started; arms of one kind share a server."""

    flags: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    workers: bool = True


ARMS = {
    arm.name: arm
    for arm in (
        Arm("adapter", "adapter"),
        Arm("adapter-cold", "adapter", cold=True),
        Arm("adapter-merged", "adapter", cold=True, env=(("F2L_MERGE_RATE", _MERGE),)),
        Arm("frames", "frames"),
        Arm("frames-cached", "frames", warmed=True, flags=_ALL_KEPT, workers=False),
        Arm("frames-merged", "frames", flags=(*_NOTHING_KEPT, "--video-pruning-rate", _MERGE), workers=False),
        Arm("text", "text"),
    )
}


def about_adapter(file_id: str) -> dict[str, Any]:
    """The part of a question that names its video: an uploaded file, answered from its adapter."""
    return {"model": file_id}


def about_frames(model: str, video: Path) -> dict[str, Any]:
    """The part of a question that names its video: the bytes inline, as vLLM's own multimodal API takes them."""
    url = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
    part = {"type": "video_url", "video_url": {"url": url}}
    return {"model": model, "parts": [part], "extra_body": {"f2l": {"mode": "frames"}}}
