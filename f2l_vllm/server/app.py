"""The endpoint plugin: vLLM's API server calls it once to attach routes and once, with the engine up, to start.

Named `f2l_files` in `VLLM_PLUGINS`; settings come from the environment (`f2l_vllm.settings`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from filelock import FileLock, Timeout
from starlette.datastructures import State
from starlette.middleware import Middleware

from f2l_vllm import torch_shims

torch_shims.install()

from f2l_vllm import logs, models  # noqa: E402  (torchvision must be importable first)
from f2l_vllm.base_models.shapes import BaseShapes  # noqa: E402
from f2l_vllm.catalog.catalog import Catalog  # noqa: E402
from f2l_vllm.engine.defaults import check_limits  # noqa: E402
from f2l_vllm.hypernetwork.config_file import read_config  # noqa: E402
from f2l_vllm.hypernetwork.fit import check_shapes  # noqa: E402
from f2l_vllm.pool.messages import WorkerSpec  # noqa: E402
from f2l_vllm.pool.supervisor import PoolProcess  # noqa: E402
from f2l_vllm.server import vllm_api, vllm_errors, vllm_grammars  # noqa: E402
from f2l_vllm.server.chat import separator  # noqa: E402
from f2l_vllm.server.chat.compose import Composer  # noqa: E402
from f2l_vllm.server.chat.constraints import Constraint, constraints  # noqa: E402
from f2l_vllm.server.chat.content import private  # noqa: E402
from f2l_vllm.server.chat.grammars import Grammars  # noqa: E402
from f2l_vllm.server.chat.handlers import ChatHandler, CompletionHandler, Guard  # noqa: E402
from f2l_vllm.server.chat.resolve import Asking  # noqa: E402
from f2l_vllm.server.media import connector  # noqa: E402
from f2l_vllm.server.middleware.auth import AuthMiddleware, keep_listed_routes  # noqa: E402
from f2l_vllm.server.middleware.bodies import Bodies  # noqa: E402
from f2l_vllm.server.middleware.ending import Ending, LastWords  # noqa: E402
from f2l_vllm.server.middleware.faults import Faults  # noqa: E402
from f2l_vllm.server.registry import Registry  # noqa: E402
from f2l_vllm.server.tenants import Keys, asking_tenant  # noqa: E402
from f2l_vllm.server.videos.routes import router  # noqa: E402
from f2l_vllm.server.videos.service import Revisions, VideoService, count_outcome  # noqa: E402
from f2l_vllm.settings import SERVER_LOCK, Settings, listed  # noqa: E402
from f2l_vllm.store.address import fingerprint  # noqa: E402
from f2l_vllm.store.store import Store  # noqa: E402

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 5.0
_WELCOME_SECONDS = 0.1
_CLOSE_SECONDS = 0.5  # for connections that are left when the server stops


class F2LEndpointPlugin:
    """vLLM's `EndpointPlugin`: videos as files, answered from adapters."""

    name = "f2l_files"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None
        self._service: VideoService | None = None
        self._lock: FileLock | None = None
        self._ending: Ending | None = None
        self._stop_engine: Callable[[], object] = bool
        self._welcome: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []
        self._grammars: Grammars | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, take away those not listed, and add the shutdown."""
        settings = Settings.read()
        app.include_router(router)
        keep_listed_routes(app, [*listed(settings.open_routes), *listed(settings.extra_routes)])
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
            ValueError: settings, model and hypernetwork that cannot work together; the server does not start then.
        """
        vllm_api.log_like_vllm("f2l_vllm")
        logs.quiet_paths |= vllm_api.quiet_paths(args)
        vllm_api.check_environment(args)
        settings = Settings.read()
        keys = Keys(vllm_api.api_keys(args), settings.tenants)
        assert self._app is not None, "vLLM attaches routes first"
        # Outermost, before vLLM's own check, whose answer OpenAI clients cannot read. vLLM has built the stack already.
        open_routes = listed(settings.open_routes)
        ending = self._ending = Ending(
            vllm_api.grace_seconds(args, settings),
            lambda: self._stop_http(state),
            lambda: vllm_api.is_stopping(state),
        )
        self._stop_engine = lambda: vllm_api.stop_engine(engine_client)
        last_words = Middleware(LastWords, ending=ending, always=[path for path in open_routes if path != "/ready"])
        door = Middleware(AuthMiddleware, keys=keys, open_routes=open_routes)
        faults = Middleware(Faults, idle_seconds=settings.body_idle_seconds)
        bodies = Middleware(
            Bodies,
            max_body_bytes=settings.max_body_bytes,
            max_images=settings.max_images,
            has_tenants=keys.has_tenants,
            check=self._check_of(engine_client, settings),
        )
        self._app.user_middleware[:0] = [last_words, door, faults, bodies]
        vllm_errors.install_handlers(self._app)
        self._app.middleware_stack = self._app.build_middleware_stack()
        limits = vllm_api.engine_limits(engine_client)
        vllm_api.leave_adapters_out_of_metrics(engine_client)
        base_names = vllm_api.base_model_names(state)
        model = models.resolve(args.model)
        hypernetwork = models.resolve_hypernetwork(args.model, settings.hypernetwork)
        config = read_config(hypernetwork)
        shapes = BaseShapes.read(model)
        check_shapes(shapes, config)
        check_limits(limits, rank=2 * config.rank, modules=config.modules)
        home = settings.data_folder
        self._lock = hold(home)
        store = Store(
            home,
            url=settings.store,
            cache_bytes=settings.cache_bytes,
            hot_bytes=settings.hot_bytes,
            reserve_bytes=settings.reserve_bytes,
        )
        catalog = Catalog(settings.catalog_url)
        registry = Registry(
            vllm_api.lora_registry(state),
            engine_client,
            store,
            base_model=base_names[0],
            host_slots=limits.host_slots,
            wanted=catalog.wanted,
        )
        pool = None
        if settings.hypernetwork_workers:
            pool = PoolProcess(worker_spec(settings, model, hypernetwork, limits.max_rank, config.rank), count_outcome)
        # What is not set of how frames are taken is in the model's and hypernetwork's files, which the revisions cover.
        revisions = Revisions(fingerprint(model), fingerprint(hypernetwork), settings.sampling)
        self._service = VideoService(settings, revisions, catalog, store, registry, pool, lambda: ending.is_stopping)
        store.protect(registry.holds)
        await asyncio.to_thread(self._service.adopt)
        if pool is not None:
            pool.start()
        state.f2l = self._service
        state.f2l_base_model = models.loadable_name(model)
        warm = self._service.warm(min(settings.warm_adapters, limits.host_slots))
        self._background = [asyncio.create_task(self._service.maintain()), asyncio.create_task(warm)]
        composer = Composer(
            catalog,
            store,
            registry,
            shapes=shapes,
            base_name=model.name,
            chunk_rank=config.rank,
            max_rank=limits.max_rank,
            keep=settings.max_composed,
        )
        asking = Asking(self._service, composer)
        between = separator.find(functools.partial(vllm_api.rendered, state.openai_serving_chat))
        if between:
            vllm_api.wrap_chat_answers(state, functools.partial(separator.left_out, separator=between))
        vllm_api.wrap_servings(
            state,
            lambda inner: ChatHandler(vllm_api.noting_visual_tokens(inner), asking, base_names),
            lambda inner: CompletionHandler(inner, asking, base_names),
        )
        vllm_api.guard_other_servings(state, Guard)
        apart = keys.has_tenants and not settings.share_caches
        vllm_api.enclose_renderings(engine_client, connector.question, salt_of_tenant if apart else lambda given: given)
        self._welcome = asyncio.create_task(_welcome(self._service, state, vllm_api.url(args)))
        logger.info("model %s, hypernetwork %s, data in %s", base_names[0], hypernetwork, home)
        if keys.is_open:
            logger.info("no API key is set: whoever reaches this server may use it (--api-key, --tenants)")

    def _stop_http(self, state: State) -> None:
        if self._service is not None and self._service.pool is not None:
            threading.Thread(target=self._service.pool.stop, daemon=True).start()  # while connections are closed
        vllm_api.stop_http(state)

    def _check_of(self, engine_client: Any, settings: Settings) -> Callable[[Any, str], Awaitable[None]]:
        """What refuses a body whose constraints the engine should not be given."""
        vocabulary = vllm_grammars.vocabulary(engine_client)
        self._grammars = grammars = Grammars(vocabulary, vllm_grammars.language, settings.grammar_limits)
        if vllm_grammars.use_xgrammar(engine_client):
            vllm_grammars.try_before_generating(engine_client, grammars.check)
            tried = grammars.check
        else:
            logger.warning("constraints are bounded by their size alone: only those of xgrammar are tried beforehand")

            async def tried(constraint: Constraint, tenant: str) -> None:
                return None

        async def check(body: Any, tenant: str) -> None:
            for constraint in constraints(body):
                await tried(constraint, tenant)

        return check

    async def _stop(self) -> None:
        if self._ending is None:
            return  # the engine did not come up
        if self._welcome is not None:
            self._welcome.cancel()
        if self._grammars is not None:
            self._grammars.close()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        parts: list[Callable[[], object]] = [self._stop_engine]
        if self._service is not None:
            parts.append(self._service.close)
        await self._ending.finish(*parts)


async def _welcome(service: VideoService, state: State, url: str) -> None:
    """The last line of the start: videos are taken from here on."""
    while not (service.is_ready() and vllm_api.is_serving(state)):
        await asyncio.sleep(_WELCOME_SECONDS)
    upload = f"curl -F purpose=vision -F file=@video.mp4 {url}/v1/files"
    logger.info("ready: %s (upload a video: %s; then ask, its id is the model)", url, upload)


def hold(home: Path) -> FileLock:
    """Take the data folder, for as long as this process lives: leases and names of adapters are known to one server.

    Raises:
        ValueError: another server has it.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / SERVER_LOCK, thread_local=False)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise ValueError(f"another server runs on the data folder {home}: stop it, or set F2L_HOME") from error
    return lock


def salt_of_tenant(given: str | None) -> str:
    """The salt of the caller's prefixes: no tenant's blocks are found by another's questions."""
    return private(asking_tenant.get(), given or "")


def worker_spec(settings: Settings, model: Path, hypernetwork: Path, max_rank: int, chunk_rank: int) -> WorkerSpec:
    """What each worker loads, and how it reads videos."""
    return WorkerSpec(
        model=model,
        hypernetwork=hypernetwork,
        home=settings.data_folder,
        store=settings.store,
        reserve_bytes=settings.reserve_bytes,
        base_name=model.name,
        max_rank=max_rank,
        limits=settings.video_limits,
        threads=max(1, int(settings.worker_cpus)),
        max_frames=settings.max_frames,
        fps=settings.fps,
        chunk_seconds=settings.chunk_seconds,
        chunk_frames=settings.chunk_frames,
        max_chunks=max_rank // chunk_rank - 1 if settings.is_chunked else 0,  # the bias takes the rank of one chunk
        merge_rate=settings.merge_rate,
        batch_tokens=settings.batch_tokens,
        decode=settings.decode_limits,
    )
