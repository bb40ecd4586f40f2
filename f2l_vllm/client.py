"""Asks a server as any user does, with the stock openai client: uploads videos, waits for them and times answers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI
from openai.types import FileObject
from openai.types.chat import ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

FROM_FRAMES = {"f2l": {"mode": "frames"}}  # `extra_body` of a question that is answered from frames in context
_POLL_SECONDS = 0.05
_WAIT_SECONDS = 3600.0


class NotInternalized(RuntimeError):
    """The server accepted a video and could not internalize it. `reason`: in the server's words."""

    code = "video_failed"  # with which the server answers a question about it

    def __init__(self, file: FileObject) -> None:
        self.reason = file.status_details or file.status
        self.message = f"{file.filename} was not internalized: {self.reason}"
        super().__init__(self.message)


@dataclass(frozen=True)
class Answer:
    """A streamed answer and its times, in seconds.

    Attributes:
        started: when the question was sent, by `time.perf_counter`.
        ttft: from `started` to the first token; `itl` holds the gap before every further chunk.
        latency: from `started` to the last token.
        output_tokens: 0 if none came.
        details: the response's `f2l` object; empty if the server sends none.
    """

    started: float
    ttft: float
    latency: float
    itl: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    details: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @classmethod
    def of(cls, started: float, chunks: Sequence[tuple[float, ChatCompletionChunk]]) -> Answer:
        """From chunks, each with the time when it came."""
        times = [at for at, chunk in chunks if chunk.choices] or [time.perf_counter()]
        usage = next((chunk.usage for _, chunk in reversed(chunks) if chunk.usage), None)
        said = ((chunk.model_extra or {}).get("f2l") for _, chunk in reversed(chunks))
        return cls(
            started,
            times[0] - started,
            times[-1] - started,
            tuple(after - before for before, after in itertools.pairwise(times)),
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
            next(filter(None, said), {}),
            "".join(chunk.choices[0].delta.content or "" for _, chunk in chunks if chunk.choices).strip(),
        )

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 for an answer of one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def upload(client: OpenAI, *videos: Path, poll_seconds: float = _POLL_SECONDS) -> list[FileObject]:
    """Upload videos; returns when all are internalized.

    Raises:
        NotInternalized: one of them cannot be.
    """
    sent = [client.files.create(file=video, purpose="vision") for video in videos]
    wait = client.files.wait_for_processing
    return [_whole(wait(file.id, poll_interval=poll_seconds, max_wait_seconds=_WAIT_SECONDS)) for file in sent]


async def processed(client: AsyncOpenAI, file: FileObject) -> FileObject:
    """The file, once its video is internalized.

    Raises:
        NotInternalized: it cannot be.
    """
    wait = client.files.wait_for_processing
    return _whole(await wait(file.id, poll_interval=_POLL_SECONDS, max_wait_seconds=_WAIT_SECONDS))


async def base_model(client: AsyncOpenAI) -> str:
    """The id under which the server serves the model itself."""
    served = await client.models.list()
    return next(model.id for model in served.data if not (model.model_extra or {}).get("parent"))


def ask(client: OpenAI, model: str, question: str, max_tokens: int, extra_body: Any = None) -> Answer:
    """Ask one question, with greedy decoding. `extra_body`: more fields of the request."""
    started = time.perf_counter()
    chunks = client.chat.completions.create(**_request(model, question, max_tokens, extra_body))
    return Answer.of(started, [(time.perf_counter(), chunk) for chunk in chunks])


async def ask_async(
    client: AsyncOpenAI, model: str, content: Any, max_tokens: int, extra_body: Any = None, started: float | None = None
) -> Answer:
    """As `ask`. `content`: a text, or the parts of a message; `started`: when its time begins, if not now."""
    started = time.perf_counter() if started is None else started
    chunks = await client.chat.completions.create(**_request(model, content, max_tokens, extra_body))
    return Answer.of(started, [(time.perf_counter(), chunk) async for chunk in chunks])


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels, as the server at `url` (without `/v1`) tells it."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = (one for family in families for one in family.samples)
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def _whole(file: FileObject) -> FileObject:
    if file.status != "processed":
        raise NotInternalized(file)
    return file


def _request(model: str, content: Any, max_tokens: int, extra_body: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_completion_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": extra_body,
    }
