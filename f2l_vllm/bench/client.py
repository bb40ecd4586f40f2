"""The client: uploads videos, and asks for answers of one length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from openai import AsyncOpenAI
from openai.types import FileObject

from f2l_vllm import client
from f2l_vllm.client import Answer

_TIMEOUT_SECONDS = 3600.0


class WrongAnswer(RuntimeError):
    """A server did not answer as asked, so the measurement would be of something else."""


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
        return await client.base_model(self._openai)

    async def upload(self, video: Path, wait: bool = True) -> FileObject:
        """Upload a video; with `wait`, return when it is internalized.

        Raises:
            WrongAnswer: it could not be internalized.
        """
        file = await self._openai.files.create(file=video, purpose="vision")
        self._uploaded.add(file.id)
        if not wait:
            return file
        try:
            return await client.processed(self._openai, file)
        except client.NotInternalized as error:
            raise WrongAnswer(str(error)) from error

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
        content = [*parts, {"type": "text", "text": question}]
        body = {"ignore_eos": True, **(extra_body or {})}
        answer = await client.ask_async(self._openai, model, content, self._output_tokens, body, started)
        if answer.output_tokens != self._output_tokens:
            got = f"{answer.output_tokens} tokens" if answer.output_tokens else "no token"
            raise WrongAnswer(f"an answer of {self._output_tokens} tokens was asked for, and {got} came")
        return answer
