"""Compiles constraints on trial, in processes that can be killed, before the engine gets them.

The engine compiles in its own process, where nothing can stop a compilation, and follows constraints inside its steps.
A constraint that a trial compiled and followed within its limits costs the engine no more than those limits.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import struct
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any
from weakref import WeakValueDictionary

from f2l_vllm.grammar_limits import GrammarLimits
from f2l_vllm.server.chat.constraints import Constraint, check, invalid, too_complex
from f2l_vllm.server.errors import APIError

logger = logging.getLogger(__name__)

_AT_ONCE = 2
_START_SECONDS = 120.0
_REMEMBERED = 4096


class Grammars:
    """Tries constraints. Lives on the API server's event loop. The trial process starts with the first constraint.

    Args:
        vocabulary: returns the tokenizer's vocabulary, as xgrammar's `TokenizerInfo.serialize_json` writes it.
        kind_of: returns the language to compile a constraint as (`lark` or `grammar` for a grammar), and its text.
    """

    def __init__(
        self, vocabulary: Callable[[], str], kind_of: Callable[[Constraint], tuple[str, str]], limits: GrammarLimits
    ) -> None:
        self._vocabulary = vocabulary
        self._kind_of = kind_of
        self._limits = limits
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0
        self._known: OrderedDict[bytes, dict[str, Any]] = OrderedDict()

    async def check(self, constraint: Constraint, tenant: str) -> None:
        """Return when the constraint has been tried. Each tenant's constraints are tried one at a time.

        Raises:
            APIError: `structured_output_too_complex`, `invalid_structured_output`.
        """
        check(constraint)
        digest = hashlib.sha256(f"{constraint.kind}:{constraint.text}".encode()).digest()
        if digest not in self._known:
            turn = self._turns.setdefault(tenant, asyncio.Lock())
            async with turn, self._places:
                if digest not in self._known:
                    answer = await self._try(constraint)
                    if answer.get("died"):  # perhaps the machine was busy: do not remember it, a retry may succeed
                        raise_refusal(answer)
                    self._known[digest] = answer
                    if len(self._known) > _REMEMBERED:
                        self._known.popitem(last=False)
        self._known.move_to_end(digest)
        raise_refusal(self._known[digest])

    async def close(self) -> None:
        """End the trial process, and close its pipes while the event loop still runs."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _try(self, constraint: Constraint) -> dict[str, Any]:
        process = await self._running()
        kind, text = self._kind_of(constraint)
        self._last_id += 1
        request, answered = self._last_id, asyncio.get_running_loop().create_future()
        self._waiting[request] = answered
        try:
            await _write(process, {"id": request, "kind": kind, "text": text})
            answer: dict[str, Any] = await answered
            return answer
        except asyncio.CancelledError:
            await _write(process, {"cancel": request})
            raise
        finally:
            self._waiting.pop(request, None)

    async def _running(self) -> Process:
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return self._process
            # Library threads would not survive a fork, and xgrammar needs none of them.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "USE_TORCH": "0"}
            vocabulary = await asyncio.to_thread(self._vocabulary)
            command = [sys.executable, "-m", "f2l_vllm.server.chat.grammar_child", json.dumps(asdict(self._limits))]
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=asyncio.subprocess.DEVNULL, env=environment
            )
            try:
                await _write(process, vocabulary)
                assert process.stdout is not None
                async with asyncio.timeout(_START_SECONDS):
                    ready = await process.stdout.readline()
                if not ready:
                    raise RuntimeError(f"the process that tries constraints did not start ({await process.wait()})")
            except BaseException:
                with suppress(ProcessLookupError):
                    process.kill()
                raise
            self._process, self._reader = process, asyncio.create_task(self._read(process))
            return process

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            answer = json.loads(line)
            waiting = self._waiting.get(answer["id"])
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        logger.warning("the process that tries constraints ended (%s); the next one starts another", process.returncode)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(RuntimeError("the process that tries constraints ended"))


def raise_refusal(answer: dict[str, Any]) -> None:
    """Raise the error that a trial's answer means for the request, if any."""
    refusal: APIError | None = None
    if "invalid" in answer:
        refusal = invalid(str(answer["invalid"]).rstrip("."))
    elif "slow" in answer:
        refusal = too_complex(str(answer["slow"]))
    if refusal is not None:
        raise refusal


async def _write(process: Process, message: Any) -> None:
    assert process.stdin is not None
    data = json.dumps(message).encode()
    process.stdin.write(struct.pack("!i", len(data)) + data)  # as `multiprocessing.connection` reads it
    await process.stdin.drain()
