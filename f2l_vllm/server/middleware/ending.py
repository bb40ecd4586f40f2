"""How a server stops: it refuses new requests, lets running answers finish, and tells the clients that it cuts off.

The first SIGTERM or SIGINT begins the stop; a second one ends the wait. With a delay `/ready` alone says so at first,
and load balancers send requests elsewhere before one is refused. Routes and handlers know nothing of this: `LastWords`
is in front of all of them and ends their work, a stream by a last event, everything else by an error.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from f2l_vllm import logs
from f2l_vllm.server import errors

logger = logging.getLogger(__name__)

_TOLD_SECONDS = 0.5  # for clients that are slow to read; then their connections are closed
_LEAVE_SECONDS = 4.5  # from the end of the wait to the end of the process, even if something hangs
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
READY = "/ready"


class Ending:
    """The shutdown of one server. Lives on its event loop.

    Args:
        grace_seconds: how long answers that are being written may continue.
        stop_http: stops accepting connections, closes the open ones, and finally runs `finish`.
        is_stopped: whether the server is stopping for another reason: vLLM's server ends itself when its engine dies.
        delay_seconds: how much of `grace_seconds` passes before requests are refused.
    """

    def __init__(
        self,
        grace_seconds: float,
        stop_http: Callable[[], None],
        is_stopped: Callable[[], bool],
        delay_seconds: float = 0.0,
    ) -> None:
        self._grace_seconds = grace_seconds
        self._delay_seconds = min(delay_seconds, grace_seconds)
        self._stop_http = stop_http
        self._is_stopped = is_stopped
        self._began: float | None = None
        self._refuses = False
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._cut_off = 0
        self.answers: set[_Answer] = set()

    @property
    def is_told(self) -> bool:
        """Whether the server is about to stop, which load balancers are to know."""
        return self._began is not None or self._is_stopped()

    @property
    def is_stopping(self) -> bool:
        """Whether no work may begin or wait any more."""
        return self._refuses or self._is_stopped()

    def take_signals(self) -> None:
        """Call `begin` on `_SIGNALS`. Called when the server runs, after vLLM has set its own handlers."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.begin)

    def begin(self) -> None:
        """Refuse new requests, after the delay. A second call ends the delay and the wait for answers in work."""
        if self._began is not None:
            self._hurry.set()
            return
        self._began = time.monotonic()
        self._refuses = not self._delay_seconds
        # A thread in C, which ends the process even if the event loop hangs.
        faulthandler.dump_traceback_later(self._grace_seconds + _LEAVE_SECONDS, exit=True)
        wait = f"; {len(self.answers)} answers have up to {self._grace_seconds:g} s to end" if self.answers else ""
        delay = f"; requests are taken for {self._delay_seconds:g} s more" if self._delay_seconds else ""
        logs.without_statistics()
        logger.info("stopping%s%s%s", delay, wait, " (a second signal ends them)" if wait else "")
        self._task = asyncio.create_task(self._end())

    async def _end(self) -> None:
        until = time.monotonic() + self._grace_seconds
        await self._pass(self._delay_seconds)
        self._refuses = True
        while self.answers and not self._hurry.is_set() and time.monotonic() < until:
            await self._pass(0.05)
        faulthandler.dump_traceback_later(_LEAVE_SECONDS, exit=True)
        told = [asyncio.ensure_future(answer.cut_off()) for answer in self.answers]
        self._cut_off = len(told)
        if told:
            await asyncio.wait(told, timeout=_TOLD_SECONDS)
        self._stop_http()

    async def _pass(self, seconds: float) -> None:
        """Wait so long, or until there is hurry."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def finish(self, *parts: Callable[[], object]) -> NoReturn:
        """Stop these parts of the server in parallel threads, and end the process.

        The exit code is 0 after a signal. Without a signal the engine has died, and the code is 1, so that a
        supervisor starts another server.
        """
        was_told, began = self._began is not None, self._began or time.monotonic()
        if not was_told:
            faulthandler.dump_traceback_later(_LEAVE_SECONDS, exit=True)
        # New threads, because all threads of the event loop may be busy for long.
        threads = [threading.Thread(target=_attempt, args=(part,), daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.01)
        cut = f"; {self._cut_off} answers were cut off" if self._cut_off else ""
        logger.info("stopped after %.1f s%s", time.monotonic() - began, cut)
        _leave(0 if was_told else 1)


class _Answer:
    """A request that is being answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._task = asyncio.current_task()
        self._started = self._complete = self._is_events = False
        self.was_cut_off = False

    async def send(self, message: Message) -> None:
        """Forward messages from the app behind `LastWords`, until the answer is cut off."""
        if self.was_cut_off:
            return
        if message["type"] == "http.response.start":
            self._started = True
            self._is_events = (
                dict(message.get("headers", ())).get(b"content-type", b"").startswith(b"text/event-stream")
            )
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def cut_off(self) -> None:
        """Tell the client that the answer ends here, and cancel the work."""
        if self._complete or self.was_cut_off:
            return
        self.was_cut_off = True
        error = errors.shutting_down()
        try:
            if not self._started:
                await errors.response(error, self._scope)(self._scope, self._receive, self._send)
            elif self._is_events:
                event = errors.chunk(error, self._scope["path"])
                await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
            # Any other answer that has begun ends in the middle; its length shows that.
        finally:
            if self._task is not None and self._task is not asyncio.current_task():
                self._task.cancel()


class LastWords:
    """The outermost ASGI middleware: refuses requests once the shutdown has begun, and can end earlier ones.

    Args:
        app: the app behind it.
        ending: the shutdown of this server.
        always: paths that are answered until the very end.
    """

    def __init__(self, app: ASGIApp, ending: Ending, always: Collection[str]) -> None:
        self._app = app
        self._ending = ending
        self._always = frozenset(always)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") if scope["type"] == "http" else ""
        if scope["type"] != "http" or path in self._always:
            await self._app(scope, receive, send)
            return
        stops = self._ending.is_told if path == READY else self._ending.is_stopping
        if stops:
            await errors.response(errors.shutting_down(), scope)(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        self._ending.answers.add(answer)
        try:
            await self._app(scope, receive, answer.send)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and self._ending.is_stopping:
                await answer.cut_off()  # if not done already: uvicorn cancels its tasks
            if not answer.was_cut_off:
                raise
        finally:
            self._ending.answers.discard(answer)


def _attempt(part: Callable[[], object]) -> None:
    try:
        part()
    except Exception:
        logger.exception("a part of the server did not stop in order")


def _leave(code: int) -> NoReturn:
    """End the process without waiting for threads, and without the messages that libraries print on teardown."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
