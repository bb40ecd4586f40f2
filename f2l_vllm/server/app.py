"""The endpoint plugin: vLLM's API server calls it once to attach routes, and once to start when the engine is up.

Its name is `f2l_files` in `VLLM_PLUGINS`; settings come from the environment (`f2l_vllm.settings`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from filelock import FileLock
from starlette.datastructures import State
from starlette.middleware import Middleware

from f2l_vllm import torch_shims

torch_shims.install()

from f2l_vllm import logs, models, tracing  # noqa: E402  (torchvision must be importable first)
from f2l_vllm.server import assembly, openapi, vllm_api, vllm_errors  # noqa: E402
from f2l_vllm.server.batches.runner import Batches  # noqa: E402
from f2l_vllm.server.chat.grammars import Grammars  # noqa: E402
from f2l_vllm.server.console import routes as console  # noqa: E402
from f2l_vllm.server.console.pages import Pages  # noqa: E402
from f2l_vllm.server.console.previews import Previews  # noqa: E402
from f2l_vllm.server.middleware.auth import AuthMiddleware, keep_listed_routes  # noqa: E402
from f2l_vllm.server.middleware.bodies import Bodies  # noqa: E402
from f2l_vllm.server.middleware.ending import READY, Ending, LastWords  # noqa: E402
from f2l_vllm.server.middleware.faults import Faults  # noqa: E402
from f2l_vllm.server.middleware.lingering import Lingering  # noqa: E402
from f2l_vllm.server.middleware.load import Load  # noqa: E402
from f2l_vllm.server.middleware.request_ids import RequestIds  # noqa: E402
from f2l_vllm.server.middleware.traced import Traced  # noqa: E402
from f2l_vllm.server.routes import router  # noqa: E402
from f2l_vllm.server.streams import hasty_senders  # noqa: E402
from f2l_vllm.server.streams.live import LiveStreams  # noqa: E402
from f2l_vllm.server.streams.pulls import Pulls  # noqa: E402
from f2l_vllm.server.streams.watches import Watches  # noqa: E402
from f2l_vllm.server.tenants import Keys  # noqa: E402
from f2l_vllm.server.videos.service import VideoService  # noqa: E402
from f2l_vllm.settings import CATALOG, Settings, listed  # noqa: E402

logger = logging.getLogger(__name__)

_WELCOME_SECONDS = 0.1
_CLOSE_SECONDS = 0.5  # for connections still open when the server stops


class F2LEndpointPlugin:
    """vLLM's `EndpointPlugin`: videos are files, and questions about them are answered from adapters."""

    name = "f2l_files"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None
        self._service: VideoService | None = None
        self._live: LiveStreams | None = None
        self._lock: FileLock | None = None
        self._ending: Ending | None = None
        self._stop_engine: Callable[[], object] = bool
        self._welcome: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []
        self._grammars: Grammars | None = None
        self._pages: Pages | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, remove routes that are not listed, and hook into the shutdown."""
        settings = Settings.read()
        hasty_senders.install()
        app.include_router(router)
        own: list[str] = []
        if settings.console:
            self._pages = Pages()
            own = console.attach(app, self._pages)
        openapi.extend(app)
        keep_listed_routes(app, [*own, *listed(settings.open_routes), *listed(settings.extra_routes)])
        self._app = app
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(application: FastAPI) -> AsyncIterator[Any]:
            async with inner(application) as state:
                if self._ending is not None:
                    self._ending.take_signals()
                    vllm_api.bound_http_shutdown(application.state, _CLOSE_SECONDS)
                try:
                    yield state
                finally:
                    await self._stop()

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Open catalog and store, start the pool, and put the handlers in front of vLLM's.

        Raises:
            ValueError: settings, model and hypernetwork cannot work together; the server does not start.
        """
        vllm_api.log_like_vllm("f2l_vllm")
        logs.quiet_paths |= vllm_api.quiet_paths(args)
        vllm_api.check_environment(args)
        settings = Settings.read()
        keys = Keys(vllm_api.api_keys(args), settings.tenants)
        self._stop_engine = lambda: vllm_api.stop_engine(engine_client)
        ending = self._ending = Ending(
            vllm_api.grace_seconds(args, settings),
            lambda: self._stop_http(state),
            lambda: vllm_api.is_stopping(state),
            settings.shutdown_delay_seconds,
        )
        self._grammars = assembly.open_grammars(engine_client, settings)
        served = assembly.served_model(engine_client, state, args, settings)
        self._lock = assembly.hold(settings.data_folder)
        service = self._service = assembly.open_service(settings, served, engine_client, state, ending)
        if settings.tenants == CATALOG:
            keys = service.keys
        load = functools.partial(vllm_api.questions_in_work, engine_client)
        self._put_in_front(settings, keys, ending, load)
        await service.membership.attend()
        if service.pool is not None:
            service.pool.start()
        state.f2l = service
        assert self._app is not None, "vLLM attaches routes first"
        batches = state.f2l_batches = Batches(service, self._app, load, vllm_api.api_keys(args))
        state.f2l_base_model = models.loadable_name(served.model)
        if self._pages is not None:
            state.f2l_about = assembly.about(settings, served, engine_client)
            state.f2l_previews = Previews(settings)
            service.forgetting.include(state.f2l_previews)
        warm = _warm(service, min(settings.warm_adapters, served.limits.host_slots))
        live = self._live = state.f2l_streams = LiveStreams(service)
        watches = Watches(live, self._app, vllm_api.api_keys(args))
        pulls = Pulls(live, settings.data_folder / "pulls")
        streaming = (live.run(), watches.run(), pulls.run())
        lasting = (service.maintain(), service.membership.run(), batches.run(), *streaming, warm)
        self._background = [asyncio.create_task(work) for work in lasting]
        assembly.answer_from_videos(settings, served, engine_client, state, live, keys)
        self._welcome = asyncio.create_task(_welcome(service, state, vllm_api.url(args)))
        logger.info("model %s, hypernetwork %s, data in %s", served.names[0], served.hypernetwork, settings.data_folder)
        if keys.is_open:
            logger.info("no API key is set: whoever reaches this server may use it (--api-key, --tenants)")
        elif keys is service.keys and service.keys.is_empty:
            logger.warning("the catalog has no API keys, so every request is refused: f2l-vllm keys add TENANT")

    def _put_in_front(self, settings: Settings, keys: Keys, ending: Ending, load: Callable[[], int]) -> None:
        """Install our middleware and error handlers. The middleware goes outermost, before vLLM's key check, because
        OpenAI clients cannot read that check's answer. vLLM has already built the stack, so we build it again."""
        assert self._app is not None, "vLLM attaches routes first"
        open_routes = listed(settings.open_routes)
        always = [path for path in open_routes if path != READY]
        pages = self._pages.paths if self._pages is not None else ()
        self._app.user_middleware[:0] = [
            Middleware(RequestIds),
            *vllm_api.cors(self._app),  # a preflight has no key, and pages may read refusals
            *([Middleware(Traced)] if tracing.is_on() else []),
            Middleware(Load, load=load),
            Middleware(LastWords, ending=ending, always=always),
            Middleware(Lingering),
            Middleware(AuthMiddleware, keys=keys, open_routes=[*open_routes, *pages]),
            Middleware(Faults, idle_seconds=settings.body_idle_seconds),
            Middleware(
                Bodies,
                max_body_bytes=settings.max_body_bytes,
                max_images=settings.max_images,
                has_tenants=keys.has_tenants,
                check=assembly.untried if self._grammars is None else self._grammars.check,
            ),
        ]
        vllm_errors.install_handlers(self._app)
        self._app.middleware_stack = self._app.build_middleware_stack()

    def _stop_http(self, state: State) -> None:
        if self._service is not None and self._service.pool is not None:
            threading.Thread(target=self._service.pool.stop, daemon=True).start()  # while connections close
        vllm_api.stop_http(state)

    async def _stop(self) -> None:
        if self._ending is None:
            return  # the engine did not start
        if self._welcome is not None:
            self._welcome.cancel()
        if self._grammars is not None:
            await self._grammars.close()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        parts: list[Callable[[], object]] = [self._stop_engine]
        if self._service is not None:
            parts.append(self._service.close)
        if self._live is not None:
            parts.append(self._live.close)
        await self._ending.finish(*parts)


async def _warm(service: VideoService, limit: int) -> None:
    await service.membership.appointed.wait()
    await service.residents.warm(limit)


async def _welcome(service: VideoService, state: State, url: str) -> None:
    """Log that the server is ready, once it accepts videos."""
    while not (service.is_ready() and service.membership.why_not_ready is None and vllm_api.is_serving(state)):
        await asyncio.sleep(_WELCOME_SECONDS)
    upload = f"curl -F purpose=vision -F file=@video.mp4 {url}/v1/files"
    logger.info("ready: %s (upload a video: %s; then ask, its id is the model)", url, upload)
