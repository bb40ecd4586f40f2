"""A server of a history: everything that is ours is real, and the engine remembers what it loaded."""

from __future__ import annotations

import asyncio
import ctypes
import os
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import vllm.v1.engine.exceptions  # noqa: F401  (what `/ready` imports; loaded once, before servers are forked)
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.middleware import Middleware

from f2l_vllm import torch_shims
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import listen
from f2l_vllm.lifeline import end_with_spawner
from f2l_vllm.server import errors
from f2l_vllm.server.assembly import hold
from f2l_vllm.server.chat.compose import Composer
from f2l_vllm.server.chat.request import Video
from f2l_vllm.server.chat.resolve import Asking
from f2l_vllm.server.middleware.auth import AuthMiddleware
from f2l_vllm.server.registry import Registry
from f2l_vllm.server.streams.live import LiveStreams
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.server.videos.routes import router
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.settings import CATALOG, Settings
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.errors import Unavailable
from tests.soak.history import pace
from tests.support import engine

torch_shims.install()

RANK = 4
REVISIONS = Revisions("base", "one")
WEIGHTS = "weights"
_CLONE_NEWNET = 0x40000000
_own = APIRouter()


@dataclass(frozen=True)
class Place:
    """Where a process of a history runs, and what it shares with the others."""

    name: str
    home: Path
    port: int
    database: str
    store: str
    store_seconds: float = 0.0  # each call to the object store takes up to twice so long
    listen: str | None = None  # the database past a pooler
    host: str = "127.0.0.1"
    network: str = ""  # the network namespace by name, if it is another
    hurries: bool = True  # whether who is silent is given up after seconds
    answer_seconds: float = 0.005
    stage_seconds: float = 0.05  # at most, of each of a worker's stages

    @property
    def log(self) -> Path:
        """What the process says."""
        return self.home.parent / f"{self.name}.log"

    def take(self) -> None:
        """Make this process one that ends with the history, hurries, and writes what it says into a log."""
        end_with_spawner()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if self.network:
            with open(f"/run/netns/{self.network}") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"the network namespace {self.network} cannot be entered")
        if self.hurries:
            pace.hurry()


class Engine(engine.Engine):
    """Answers with the first line of the weights that it has loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[int, str] = {}

    async def add_lora(self, request: Any) -> bool:
        path = Path(request.lora_path) / WEIGHTS
        self.answers[request.lora_int_id] = (await asyncio.to_thread(path.read_text)).split("\n")[0]
        return bool(await super().add_lora(request))

    async def remove_lora(self, int_id: int) -> bool:
        self.answers.pop(int_id, None)
        return bool(await super().remove_lora(int_id))

    async def check_health(self) -> None:
        """It is well."""


@_own.post("/v1/chat/completions")
async def ask(request: Request) -> dict[str, str]:
    """What a chat handler does with one video, and the engine with what the handler gives it."""
    state, tenant, question = request.app.state, tenant_of(request), await request.json()
    named = await state.asking.find([Video(file_id=question["model"])], tenant)
    source = await state.asking.adapter(named, tenant, question["wait"])
    try:
        number = state.names[source.lease.key].lora_int_id
        await asyncio.sleep(state.answer_seconds)
        return {"answer": state.engine_client.answers[number]}
    finally:
        source.release()


@_own.get("/left")
async def left(request: Request) -> list[str]:
    """What engine and registry have."""
    state = request.app.state
    return sorted({*state.engine_client.names.values(), *state.f2l.registry.names()})


async def _say_why(_request: Request, error: Exception) -> PlainTextResponse:
    """500 with the traceback, for the history."""
    return PlainTextResponse("".join(traceback.format_exception(error)), status_code=500)


def serve(place: Place) -> None:
    """Serve until killed."""
    place.take()
    app = FastAPI(lifespan=lambda app: _life(app, place))
    app.include_router(router)
    app.include_router(_own)
    app.add_exception_handler(errors.APIError, errors.answer)
    app.add_exception_handler(RequestValidationError, errors.answer_validation)
    app.add_exception_handler(HTTPException, errors.answer_http)
    app.add_exception_handler(Unavailable, errors.answer_unavailable)
    app.add_exception_handler(Exception, _say_why)
    uvicorn.run(app, host=place.host, port=place.port, log_level="info", access_log=False)


@asynccontextmanager
async def _life(app: FastAPI, place: Place) -> AsyncIterator[None]:
    """As `F2LEndpointPlugin.init_state`, without vLLM."""
    names: dict[str, Any] = {}
    lock = hold(place.home)
    store = open_store(place.home, url=place.store, cache_bytes=1 << 18, hot_bytes=1 << 17)
    pace.put_far(store, place.store_seconds)
    catalog = Catalog(place.database)
    app.state.engine_client, app.state.answer_seconds = Engine(), place.answer_seconds
    options: dict[str, Any] = {"base_model": "base", "host_slots": 8, "wanted": catalog.refers_to}
    registry = Registry(names, app.state.engine_client, store, **options)
    store.protect(registry.holds, catalog.refers_to)
    settings = Settings(home=place.home, tenants=CATALOG)
    listener = listen(catalog, place.listen)
    service = VideoService(settings, REVISIONS, catalog, store, registry, None, lambda: False, listener)
    # In front of the routes as vLLM's plugin puts it there, when the stack has been built.
    app.user_middleware[:0] = [Middleware(AuthMiddleware, keys=service.keys, open_routes=["/ready", "/left"])]
    app.middleware_stack = app.build_middleware_stack()
    await service.membership.attend()
    composer = Composer(
        catalog, store, registry, shapes=None, base_name="base", chunk_rank=RANK, max_rank=8 * RANK, keep=16
    )
    app.state.f2l, app.state.names, app.state.asking = service, names, Asking(service, composer, LiveStreams(service))
    app.state.lasting = [asyncio.create_task(work) for work in (service.maintain(), service.membership.run())]
    try:
        yield
    finally:
        lock.release()
