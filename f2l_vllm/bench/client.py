"""The client: uploads videos and streams answers over HTTP with the stock openai client, and times every token."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from openai import AsyncOpenAI
from openai.types import FileObject

_POLL_SECONDS = 0.01
_TIMEOUT_SECONDS = 3600.0


class WrongAnswer(RuntimeError):
    """A server did not answer as asked, so the measurement would be of something else."""


@dataclass(frozen=True)
class Answer:
    """The times of one answer, in seconds.

    Attributes:
        started: by a clock that all answers share.
        ttft: from sending to the first token; `itl` holds the gap before every further chunk.
        latency: from sending to the last token.
        details: the response's `f2l` object; empty if the server sends none.
    """

    started: float
    ttft: float
    latency: float
    itl: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 for an answer of one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class Client:
    """Asks one server. A context manager.

    Args:
        url: without `/v1`.
        output_tokens: exact length of every answer.
        tidy: in the end, delete what was uploaded.
    """

    def __init__(self, url: str, output_tokens: int, api_key: str = "none", tidy: bool = False) -> None:
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=_TIMEOUT_SECONDS)
        self._output_tokens = output_tokens
        self._tidy = tidy
        self._uploaded: set[str] = set()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for file_id in list(self._uploaded) if self._tidy else ():
                await self.delete(file_id)
        finally:
            await self._openai.close()

    async def base_model(self) -> str:
        """The model's own name on this server."""
        served = await self._openai.models.list()
        return next(model.id for model in served.data if not (model.model_extra or {}).get("parent"))

    async def upload(self, video: Path, wait: bool = True) -> FileObject:
        """Upload a video; with `wait`, return when it is internalized.

        Raises:
            WrongAnswer: it could not be internalized.
        """
        file = await self._openai.files.create(file=video, purpose="vision")
        self._uploaded.add(file.id)
        if not wait:
            return file
        file = await self._openai.files.wait_for_processing(
            file.id, poll_interval=_POLL_SECONDS * 5, max_wait_seconds=_TIMEOUT_SECONDS
        )
        if file.status != "processed":
            raise WrongAnswer(f"{file.filename} was not internalized: {file.status_details or file.status}")
        return file

    async def file(self, file_id: str) -> FileObject:
        """The server's description of a file."""
        return await self._openai.files.retrieve(file_id)

    async def delete(self, file_id: str) -> None:
        """Delete a file and its adapter."""
        await self._openai.files.delete(file_id)
        self._uploaded.discard(file_id)

    async def ask(
        self,
        question: str,
        model: str,
        parts: Sequence[dict[str, Any]] = (),
        extra_body: dict[str, Any] | None = None,
        started: float | None = None,
    ) -> Answer:
        """Ask one question, with greedy decoding.

        Args:
            parts: of the message, in front of the question.
            extra_body: of the request.
            started: when the question's time begins, e.g. with its video's upload; now when None.

        Raises:
            WrongAnswer: the answer is not as long as asked, or has no token.
        """
        content: Any = [*parts, {"type": "text", "text": question}]
        started = time.perf_counter() if started is None else started
        stream = await self._openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_completion_tokens=self._output_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, **(extra_body or {})},
        )
        times: list[float] = []
        usage: Any = None
        details: dict[str, Any] = {}
        async for chunk in stream:
            if chunk.choices:
                times.append(time.perf_counter())
            usage = chunk.usage or usage
            details = (chunk.model_extra or {}).get("f2l") or details
        if not times or usage is None or usage.completion_tokens != self._output_tokens:
            got = "no token" if usage is None else f"{usage.completion_tokens} tokens"
            raise WrongAnswer(f"an answer of {self._output_tokens} tokens was asked for, and {got} came")
        return Answer(
            started,
            times[0] - started,
            times[-1] - started,
            tuple(after - before for before, after in itertools.pairwise(times)),
            usage.prompt_tokens,
            usage.completion_tokens,
            details,
        )
