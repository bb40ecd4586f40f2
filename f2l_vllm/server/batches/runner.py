"""One server's work on the batches of its catalog.

A server takes a batch as a duty, which another one may take when this one is silent. It works on one batch of each
tenant at a time, so that tenants take turns.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.types import ASGIApp

from f2l_vllm.catalog.batch_tables import BatchRecord, BatchState
from f2l_vllm.catalog.batches import duty
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.server import metrics
from f2l_vllm.server.batches import lines
from f2l_vllm.server.batches.lines import Line, Requests
from f2l_vllm.server.chat.request import WAIT_HEADER
from f2l_vllm.server.inward import InwardAnswer, post
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import StoreError

logger = logging.getLogger(__name__)
_THREADS = 4  # so that no question waits for a thread that a batch has
_TICK_SECONDS = 2.0
_AGAIN_SECONDS = 30.0  # after a failure of this server's
_LOOK_SECONDS = 0.05  # between two looks at how much the engine has to do
_PAUSE_SECONDS = 30.0  # the longest before a line is asked again
_ATTEMPTS = 20  # at a line that the server is too busy for
_AT_ONCE = 200  # answers that are read at a time
_PASSING = {"video_not_ready", "catalog_busy", "store_unavailable", "other_models"}  # waited for while a batch lasts
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_WAIT_SECONDS = "1"  # for a video, in a place that another line could have; then the line is asked again
_T = TypeVar("_T")
_LOST = "The input was deleted before all of its requests were answered."


class _InputGone(Exception):
    pass


class Batches:
    """Lives on the API server's event loop.

    Args:
        service: catalog, store and settings.
        app: the whole application, which answers a batch's questions as it answers a client's.
        load: how many requests the engine has, everybody's.
        keys: those that vLLM's own middleware asks for.
    """

    def __init__(self, service: VideoService, app: ASGIApp, load: Callable[[], int], keys: Sequence[str] = ()) -> None:
        self._service, self._app, self._load = service, app, load
        self._headers = {WAIT_HEADER: _WAIT_SECONDS, **({"authorization": f"Bearer {keys[0]}"} if keys else {})}
        self._catalog, self._limit = service.catalog, service.settings.batch_requests
        self._places = asyncio.Semaphore(self._limit)
        self._asking = 0
        self._works: dict[str, tuple[BatchRecord, asyncio.Task[None]]] = {}  # by id, each with the batch as it was then
        self._rests: dict[str, float] = {}  # until when a batch that failed is left alone
        self._bell = asyncio.Event()
        self._threads = ThreadPoolExecutor(_THREADS, "f2l-batches")

    def ring(self) -> None:
        """Look at the batches at once."""
        self._bell.set()

    async def run(self) -> None:
        """Work on batches, until cancelled."""
        if not self._limit:
            return
        await self._service.membership.appointed.wait()
        try:
            while True:
                try:
                    await self.look()
                except Unavailable as error:
                    logger.info("batches wait: %s", error)
                except Exception:
                    logger.exception("batches wait")
                self._bell.clear()
                try:
                    async with asyncio.timeout(_TICK_SECONDS):
                        await self._bell.wait()
                except TimeoutError:
                    pass
        finally:
            for _, task in self._works.values():
                task.cancel()

    async def look(self) -> None:
        """Begin what is to be done, and stop what is no longer.

        Raises:
            Unavailable: the catalog cannot be asked.
        """
        if self._service.is_stopping or self._service.membership.is_waiting:
            return
        known = await self._run(self._catalog.open_batches)
        now, name = self._catalog.now(), self._service.forgetting.name
        is_open = {batch.id: batch for batch in known}
        for then, task in list(self._works.values()):
            batch = is_open.get(then.id)
            is_over = batch is None or batch.state is not then.state or _is_due(batch, now)
            if is_over or not await self._run(self._catalog.hold_duty, duty(then), name):
                task.cancel()
            elif then.state is BatchState.IN_PROGRESS and not await self._has_input(then):
                await self._lose(then)
                task.cancel()
        asked = {then.tenant for then, _ in self._works.values() if then.state is BatchState.IN_PROGRESS}
        for batch in known:
            if batch.id in self._works or self._rests.get(batch.id, 0.0) > time.monotonic():
                continue
            asks = batch.state is BatchState.IN_PROGRESS and not _is_due(batch, now)
            if asks and batch.tenant in asked:
                continue
            if await self._run(self._catalog.hold_duty, duty(batch), name):
                self._works[batch.id] = batch, asyncio.create_task(self._work(batch))
                asked |= {batch.tenant} if asks else set()
        self._rests = {name: until for name, until in self._rests.items() if name in is_open}

    async def _work(self, batch: BatchRecord) -> None:
        """Take a batch to its next state."""
        try:
            known = await self._run(self._catalog.batch, batch.id, batch.tenant)
            if known is None or known.state is not batch.state:
                return
            if batch.state in (BatchState.FINALIZING, BatchState.CANCELLING):
                await self._end(batch)
            elif _is_due(batch, self._catalog.now()):
                state = BatchState.EXPIRED if batch.state is BatchState.VALIDATING else BatchState.FINALIZING
                await self._move(batch, state, outcome=BatchState.EXPIRED)
            elif batch.state is BatchState.VALIDATING:
                await self._begin(batch)
            else:
                await self._ask_all(batch)
        except _InputGone:
            await self._lose(batch)
        except Unavailable as error:
            self._rests[batch.id] = time.monotonic() + _TICK_SECONDS
            logger.warning("%s goes on later: %s", batch.id, error)
        except Exception:
            self._rests[batch.id] = time.monotonic() + _AGAIN_SECONDS
            logger.exception("%s goes on later", batch.id)
        finally:
            del self._works[batch.id]
            self.ring()

    async def _begin(self, batch: BatchRecord) -> None:
        """Check the input."""
        async with self._requests(batch) as requests:
            if requests.faults:
                faults = {"object": "list", "data": requests.faults}
                await self._move(batch, BatchState.FAILED, total=len(requests.lines), errors=faults)
            else:
                await self._move(batch, BatchState.IN_PROGRESS, total=len(requests.lines))

    async def _ask_all(self, batch: BatchRecord) -> None:
        answered = await self._run(self._catalog.answered, batch)
        async with self._requests(batch) as requests:
            left = deque((line, 1) for line in requests.lines if line.number not in answered)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._limit, len(left))):
                    group.create_task(self._ask_some(batch, requests, left))
        if left or self._service.is_stopping:
            self._rests[batch.id] = time.monotonic() + _TICK_SECONDS
        else:
            await self._move(batch, BatchState.FINALIZING, outcome=BatchState.COMPLETED)

    async def _ask_some(self, batch: BatchRecord, requests: Requests, left: deque[tuple[Line, int]]) -> None:
        """Ask one line after the other. Those whose time has not come yet go to the end."""
        while left:
            line, attempt = left.popleft()
            answer = InwardAnswer()
            async with self._place():
                if not self._service.is_stopping:
                    body = await self._run(requests.body, line)
                    answer = await post(self._app, batch.endpoint, batch.tenant, body, self._headers)
            if not answer.status:  # the server stops: the next one asks it again
                left.append((line, attempt))
                return
            waits = answer.code in _PASSING
            if waits or (answer.status in _BUSY and attempt < _ATTEMPTS):
                left.append((line, attempt + (not waits)))
                pause = answer.headers.get("retry-after", "")
                await asyncio.sleep(min(float(pause), _PAUSE_SECONDS) if pause.isdecimal() else 1.0)
                continue
            await self._keep(batch, line, answer)

    async def _keep(self, batch: BatchRecord, line: Line, answer: InwardAnswer) -> None:
        is_success = answer.status == HTTPStatus.OK
        text = lines.answer(batch.id, line, answer.status, answer.headers.get("x-request-id"), answer.body)
        while True:
            try:
                kept = await self._run(self._catalog.add_answer, batch, line.number, text, is_success=is_success)
            except Unavailable as error:
                logger.warning("an answer of %s is kept later: %s", batch.id, error)
                await asyncio.sleep(_TICK_SECONDS)
            else:
                metrics.BATCH_LINES.labels("answered" if is_success else "failed").inc(kept)
                return

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """While few requests are in the engine, everybody's counted; one question of batches always goes on."""
        async with self._places:
            while self._asking and self._load() >= self._limit:
                await asyncio.sleep(_LOOK_SECONDS)
            self._asking += 1
            try:
                yield
            finally:
                self._asking -= 1

    async def _end(self, batch: BatchRecord) -> None:
        """Make files of the answers. They are the same files however often this is begun."""
        outcome = BatchState(batch.details.get("outcome", BatchState.CANCELLED))
        late = []
        if outcome is BatchState.EXPIRED and await self._has_input(batch):
            answered = await self._run(self._catalog.answered, batch)
            async with self._requests(batch) as requests:
                late = [lines.unanswered(batch.id, line) for line in requests.lines if line.number not in answered]
        output = await self._file(batch, "output", True, [])
        errors = await self._file(batch, "error", False, late)
        await self._move(batch, outcome, output_file_id=output, error_file_id=errors)

    async def _file(self, batch: BatchRecord, kind: str, is_success: bool, more: list[str]) -> str | None:
        """Its id; None if it would be empty."""
        temporary = self._service.store.temporary()

        def write() -> tuple[str, int]:
            digest, after = hashlib.sha256(), 0
            with temporary.open("wb") as file:
                while page := self._catalog.answers(batch, is_success=is_success, after=after, limit=_AT_ONCE):
                    after = page[-1][0]
                    text = "".join(text for _, text in page).encode()
                    digest.update(text)
                    file.write(text)
                text = "".join(more).encode()
                digest.update(text)
                file.write(text)
                return digest.hexdigest(), file.tell()

        try:
            sha256, size = await self._run(write)
            if not size:
                return None
            file_id = "file-" + hashlib.sha256(f"{batch.id} {kind}".encode()).hexdigest()[:24]
            seconds = batch.details.get("output_seconds")
            name = f"{batch.id}_{kind}.jsonl"
            upload = Upload(batch.tenant, sha256, size, name, "batch_output", seconds, file_id=file_id)
            return (await self._service.enter(temporary, upload)).id
        finally:
            await self._run(self._service.store.discard, temporary)

    @asynccontextmanager
    async def _requests(self, batch: BatchRecord) -> AsyncIterator[Requests]:
        def read() -> Requests:
            record = self._catalog.file(batch.input_file, batch.tenant)
            if record is None:
                raise _InputGone
            try:
                path = self._service.fetch_video(record)
                return Requests(path, batch.endpoint, self._service.settings.max_body_bytes)
            except (FileNotFoundError, StoreError) as error:
                raise _InputGone from error

        requests = await self._run(read)
        try:
            yield requests
        finally:
            requests.close()

    async def _has_input(self, batch: BatchRecord) -> bool:
        return await self._run(self._catalog.file, batch.input_file, batch.tenant) is not None

    async def _lose(self, batch: BatchRecord) -> None:
        """End a batch whose input is gone, with what was answered."""
        fault = {"code": "input_file_not_found", "message": _LOST, "param": "input_file_id", "line": None}
        state = BatchState.FAILED if batch.state is BatchState.VALIDATING else BatchState.FINALIZING
        await self._move(batch, state, outcome=BatchState.FAILED, errors={"object": "list", "data": [fault]})

    async def _run(self, method: Callable[..., _T], *args: Any, **values: Any) -> _T:
        call = functools.partial(method, *args, **values)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _move(self, batch: BatchRecord, state: BatchState, **values: Any) -> None:
        moved = await self._run(self._catalog.move_batch, batch, state, **values)
        counts = f"{moved.completed} answered, {moved.failed} failed, of {moved.total}"
        logger.info("%s is %s: %s", batch.id, moved.state, counts)


def _is_due(batch: BatchRecord, now: float) -> bool:
    return batch.expires_at <= now and batch.state in (BatchState.VALIDATING, BatchState.IN_PROGRESS)
