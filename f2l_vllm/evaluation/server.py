"""Answers from a server, asked like any user: upload files and stream answers with the stock openai client."""

from __future__ import annotations

import asyncio
import json
import shlex
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from openai import APIStatusError, AsyncOpenAI, BadRequestError, UnprocessableEntityError
from openai.types import FileObject

from f2l_vllm import models
from f2l_vllm.client import FROM_FRAMES, NotInternalized, ask_async, base_model, processed
from f2l_vllm.evaluation.questions import FRAMES, NONE, Ask, Clip, Reply, Skipped, by_video_read
from f2l_vllm.hypernetwork.config_file import read_config
from f2l_vllm.server_process import ServerProcess

OnReply = Callable[[Ask, Reply], None]
OnSkip = Callable[[Skipped], None]

_REFUSED = (BadRequestError, UnprocessableEntityError)  # this question cannot be answered; others may work


class ServerAnswers:
    """Answers through `/v1/files` and `/v1/chat/completions`, several at a time.

    Args:
        base_url: ends in `/v1`.
        concurrency: questions, and videos, in work at a time.
        max_tokens: limit of an answer.
    """

    def __init__(self, base_url: str, api_key: str, *, concurrency: int, max_tokens: int) -> None:
        self._url, self._key = base_url, api_key
        self._concurrency, self._max_tokens = concurrency, max_tokens

    def base_model(self) -> str:
        """The id under which the model itself is served.

        Raises:
            openai.APIError: the server cannot be reached, or refuses.
        """
        return asyncio.run(self._with_client(base_model))

    def answer(self, asks: Sequence[Ask], on_reply: OnReply, on_skip: OnSkip) -> None:
        """Answer everything. Each video is uploaded once, and deleted when its questions are answered.

        Args:
            on_reply: called with every answer as it arrives.
            on_skip: called for every video or question that the server refuses, with its reason.

        Raises:
            openai.APIError: the server cannot be reached, or refuses this client altogether.
        """
        asyncio.run(self._with_client(lambda client: self._answer(client, asks, on_reply, on_skip)))

    async def _with_client(self, work: Callable[[AsyncOpenAI], Any]) -> Any:
        async with AsyncOpenAI(base_url=self._url, api_key=self._key, max_retries=4, timeout=600) as client:
            return await work(client)

    async def _answer(self, client: AsyncOpenAI, asks: Sequence[Ask], on_reply: OnReply, on_skip: OnSkip) -> None:
        base = await base_model(client)
        videos, questions = asyncio.Semaphore(self._concurrency), asyncio.Semaphore(self._concurrency)

        async def question(ask: Ask, file: FileObject | None) -> None:
            async with questions:
                try:
                    on_reply(ask, await self._ask(client, ask, base, file))
                except _REFUSED as error:
                    on_skip(Skipped(ask.clip.id, f"{ask.question.id}: {_reason(error)}", ask.arm))

        async def video(clip: Clip, about: list[Ask]) -> None:
            async with videos, AsyncExitStack() as cleanup:
                file = None
                if any(ask.reads for ask in about):
                    try:
                        file = await _upload(client, clip, cleanup)
                    except (*_REFUSED, NotInternalized) as error:
                        on_skip(Skipped(clip.id, _reason(error)))
                        return
                await together(question(ask, file) for ask in about)

        await together(video(clip, about) for clip, about in by_video_read(asks))

    async def _ask(self, client: AsyncOpenAI, ask: Ask, base: str, file: FileObject | None) -> Reply:
        model = base if ask.arm == NONE or file is None else file.id
        in_frames = ask.arm == FRAMES
        answer = await ask_async(client, model, ask.question.text, self._max_tokens, FROM_FRAMES if in_frames else None)
        visual = answer.details.get("visual_tokens", None if in_frames else 0)
        return Reply(answer.text, answer.prompt_tokens, visual, answer.ttft * 1e3, answer.latency)


@contextmanager
def started_server(model: str, hypernetwork: str | None, max_frames: int | None, flags: str) -> Iterator[str]:
    """Run a server of our own for as long as the block lasts; yields its base URL.

    The frames in context are the same as those that are internalized.

    Args:
        max_frames: frames read of a video; as the hypernetwork was trained when None.
        flags: more flags for `f2l-vllm serve`, as on a command line.

    Raises:
        ValueError: no such model or hypernetwork.
        ServerFailed: the server did not start.
    """
    frames = max_frames or read_config(models.resolve_hypernetwork(model, hypernetwork)).max_frames
    given = shlex.split(flags)
    if hypernetwork is not None:
        given += ["--hypernetwork", hypernetwork]
    if max_frames is not None:
        given += ["--max-frames", str(max_frames)]
    if frames is not None:
        given += ["--media-io-kwargs", json.dumps({"video": {"max_frames": frames}})]
    with tempfile.TemporaryDirectory(prefix="f2l-eval-") as folder:
        server = ServerProcess(model, Path(folder) / "home", *given)
        try:
            server.wait_ready()
            yield f"{server.url}/v1"
        finally:
            server.end()


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await all; the first failure is raised after the others were cancelled and have cleaned up."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _upload(client: AsyncOpenAI, clip: Clip, cleanup: AsyncExitStack) -> FileObject:
    file = await client.files.create(file=clip.path, purpose="vision")
    cleanup.push_async_callback(client.files.delete, file.id)
    return await processed(client, file)


def _reason(error: Exception) -> str:
    if isinstance(error, APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        return f"{error.code or error.status_code}: {body.get('message', error.message)}"
    return error.reason if isinstance(error, NotInternalized) else str(error)
