"""Passes requests on to engines and their answers back. It knows no keys, no videos and no catalog: engines check.

A request is asked again of another engine while its client has got no byte and the whole of it is still here. After
that a stream that breaks off ends with an error event, and any other answer with the connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from f2l_vllm.cluster import question
from f2l_vllm.cluster.incoming import Incoming
from f2l_vllm.cluster.membership import Membership
from f2l_vllm.server import errors
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.middleware.lingering import Lingering
from f2l_vllm.server.middleware.load import HEADER as LOAD_HEADER

logger = logging.getLogger(__name__)

_TRIES = 3
_PAUSE_SECONDS = 0.05  # before an engine is asked a second time
_KEPT_SECONDS = 60  # less than the time after which engines close idle connections
_CONNECT_SECONDS = 2
# A machine that has vanished answers no packet. What was sent to it, or waits for it, fails after 10 s: Linux asks for
# a sign of life only where nothing is under way, and would send what is under way again for a quarter of an hour.
_ALIVE = ((socket.TCP_USER_TIMEOUT, 10_000), (socket.TCP_KEEPIDLE, 4), (socket.TCP_KEEPINTVL, 2))
# Headers that belong to one connection, or that every server makes anew.
_OURS = frozenset(
    f"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade expect host "
    f"date server {LOAD_HEADER}".split()
)
_MADE_ANEW = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")  # aiohttp would add its own
_UNSENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_FAILURES = (aiohttp.ClientError, OSError, TimeoutError)
_EVENT_END = b"\n\n"


@dataclass(frozen=True)
class Engine:
    """One that may be asked: its name in `Membership`, and its address."""

    name: str
    url: str


Choose = Callable[[str, Collection[str]], Awaitable[Engine]]


class Relay:
    """The ASGI app of a front.

    Args:
        choose: gives an engine for a key (empty: any) other than those that were tried; waits while there is none.
        engines: learns what is in work where.
        find_seconds: how long a request waits for an engine.
    """

    def __init__(self, choose: Choose, engines: Membership, find_seconds: float = 20.0) -> None:
        self._choose, self._engines, self._find_seconds = choose, engines, find_seconds
        self._http: aiohttp.ClientSession | None = None

    def app(self) -> ASGIApp:
        """The relay as a server runs it."""
        return Lingering(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            request = Incoming(scope, receive, send)
            try:
                await request.read()
                await request.while_connected(self._answer(request))
            except APIError as error:
                await errors.response(error, scope)(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._http is not None:
            await self._http.close()
        await send({"type": "lifespan.shutdown.complete"})

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_SECONDS, socket_factory=_socket),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=_MADE_ANEW,
            )
        return self._http

    async def _answer(self, request: Incoming) -> None:
        """Ask engines until one begins to answer, and pass its answer on.

        Raises:
            APIError: `no_engine`, `engine_lost`.
        """
        key = question.key(request.held) if request.is_question and request.held is not None else ""
        tried: list[str] = []
        while True:
            engine = await self._find(key, tried)
            if engine.name in tried:
                await asyncio.sleep(_PAUSE_SECONDS)
            tried.append(engine.name)
            if await self._ask(request, engine, tried):
                return

    async def _find(self, key: str, tried: Collection[str]) -> Engine:
        try:
            async with asyncio.timeout(self._find_seconds):
                return await self._choose(key, tried)
        except TimeoutError as error:
            raise _no_engine() from error

    async def _ask(self, request: Incoming, engine: Engine, tried: Collection[str]) -> bool:
        """Whether the client has its answer; if not, another engine is to be asked.

        Raises:
            APIError: `engine_lost`, and nobody may be asked again.
        """
        answer: aiohttp.ClientResponse | None = None
        if request.is_question:
            self._engines.begin(engine.name)
        try:
            try:
                answer = await self._send(request, engine)
                if (load := answer.headers.get(LOAD_HEADER, "")).isdecimal():
                    self._engines.heard(engine.name, int(load))
                if answer.status == HTTPStatus.SERVICE_UNAVAILABLE and self._may_go_elsewhere(request, tried):
                    return False
                first = await answer.content.readany()
            except _FAILURES as error:
                if request.has_left:
                    return True
                self._engines.suspect(engine.name)
                logger.info("%s does not answer: %r", engine.name, error)
                unsent = isinstance(error, _UNSENT) and not request.is_taken
                if len(tried) >= _TRIES or not (unsent or request.may_be_repeated):
                    raise _engine_lost() from error
                return False
            await self._pass_on(request, engine, answer, first)
            return True
        finally:
            if answer is not None and not answer.content.at_eof():
                answer.close()  # the engine stops its work when its connection ends
            if request.is_question:
                self._engines.end(engine.name)

    def _may_go_elsewhere(self, request: Incoming, tried: Collection[str]) -> bool:
        return request.may_be_repeated and len(tried) < _TRIES and bool(self._engines.urls().keys() - set(tried))

    async def _send(self, request: Incoming, engine: Engine) -> aiohttp.ClientResponse:
        scope = request.scope
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        query = scope.get("query_string", b"").decode("latin-1")
        path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        data: Any = (request.held or None) if request.held is not None else request.rest()
        return await self._session().request(
            scope["method"],
            URL(f"{engine.url}{path}?{query}" if query else f"{engine.url}{path}", encoded=True),
            headers=[(name, value) for name, value in headers if name not in _OURS],
            data=data,
            allow_redirects=False,
        )

    async def _pass_on(self, request: Incoming, engine: Engine, answer: aiohttp.ClientResponse, first: bytes) -> None:
        """Send what the engine sends, events whole or not at all."""
        head = [(name.lower(), value) for name, value in answer.raw_headers]
        kept = [(name, value) for name, value in head if name.decode("latin-1") not in _OURS]
        await request.send({"type": "http.response.start", "status": answer.status, "headers": kept})
        is_events = answer.content_type == "text/event-stream"
        piece, rest, last = first, b"", b""
        try:
            while piece:
                if is_events and (rest or not piece.endswith(_EVENT_END)):
                    whole, end, rest = (rest + piece).rpartition(_EVENT_END)
                    piece = whole + end
                if piece:
                    await request.send({"type": "http.response.body", "body": piece, "more_body": True})
                piece = await answer.content.readany()
            last = rest
        except _FAILURES as error:
            self._engines.suspect(engine.name)
            logger.warning("%s broke off an answer: %r", engine.name, error)
            if not is_events:
                raise  # whoever runs this app closes the connection, so that no client takes it for a whole answer
            last = errors.chunk(_engine_lost(), request.path).encode()
        await request.send({"type": "http.response.body", "body": last, "more_body": False})


def _socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _ALIVE:
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _no_engine() -> APIError:
    message = "No engine is ready. Ask again in some seconds; videos in work are not lost."
    return APIError(HTTPStatus.SERVICE_UNAVAILABLE, "no_engine", message, headers={"Retry-After": "10"})


def _engine_lost() -> APIError:
    message = "The engine that worked on this request is gone: send it again."
    return APIError(HTTPStatus.SERVICE_UNAVAILABLE, "engine_lost", message, headers={"Retry-After": "2"})
