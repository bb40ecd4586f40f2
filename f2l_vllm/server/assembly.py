"""Builds the parts of a server from its own settings and vLLM's, opens them in order, and connects them."""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from starlette.datastructures import State

from f2l_vllm import models
from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import listen
from f2l_vllm.engine.defaults import EngineLimits, check_limits
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.config_file import read_config
from f2l_vllm.hypernetwork.fit import check_shapes
from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.pool.supervisor import PoolProcess
from f2l_vllm.server import metrics, vllm_answers, vllm_api, vllm_grammars
from f2l_vllm.server.chat import separator
from f2l_vllm.server.chat.compose import Composer
from f2l_vllm.server.chat.constraints import Constraint
from f2l_vllm.server.chat.content import private
from f2l_vllm.server.chat.grammars import Grammars
from f2l_vllm.server.chat.handlers import ChatHandler, CompletionHandler, Guard
from f2l_vllm.server.chat.messages import MessagesHandler
from f2l_vllm.server.chat.resolve import Asking
from f2l_vllm.server.chat.responses import ResponsesHandler
from f2l_vllm.server.media import connector
from f2l_vllm.server.middleware.ending import Ending
from f2l_vllm.server.registry import Registry
from f2l_vllm.server.streams.live import LiveStreams
from f2l_vllm.server.tenants import Keys, asking_tenant
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.settings import SERVER_LOCK, Settings, listed
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.cached_store import open_store

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class ServedModel:
    """The base model, its hypernetwork, and the limits of the running engine; `names` are its names for clients."""

    model: Path
    hypernetwork: Path
    config: HypernetworkConfig
    shapes: BaseShapes
    limits: EngineLimits
    names: list[str]


def served_model(engine_client: Any, state: State, args: Namespace, settings: Settings) -> ServedModel:
    """The model that vLLM serves, with its hypernetwork.

    Raises:
        ValueError: they do not fit together, or the engine cannot take their adapters.
    """
    limits = vllm_api.engine_limits(engine_client)
    model = models.resolve(args.model)
    hypernetwork = models.resolve_hypernetwork(args.model, settings.hypernetwork)
    config, shapes = read_config(hypernetwork), BaseShapes.read(model)
    check_shapes(shapes, config)
    check_limits(limits, rank=2 * config.rank, modules=config.modules)
    return ServedModel(model, hypernetwork, config, shapes, limits, vllm_api.base_model_names(state))


def open_grammars(engine_client: Any, settings: Settings) -> Grammars | None:
    """The object that tries every constraint before it reaches the engine; None if the backend is not xgrammar."""
    if not vllm_grammars.use_xgrammar(engine_client):
        logger.warning("constraints are bounded by their size alone: only those of xgrammar are tried beforehand")
        return None
    grammars = Grammars(vllm_grammars.vocabulary(engine_client), vllm_grammars.language, settings.grammar_limits)
    vllm_grammars.try_before_generating(engine_client, grammars.check)
    return grammars


async def untried(_constraint: Constraint, _tenant: str) -> None:
    """Accept every constraint; only its size was checked before."""


def open_service(
    settings: Settings, served: ServedModel, engine_client: Any, state: State, ending: Ending
) -> VideoService:
    """Catalog, store, registry and pool behind one service; only the catalog's listener runs already."""
    store = open_store(
        settings.data_folder,
        url=settings.store,
        cache_bytes=settings.cache_bytes,
        # On another machine an engine's worker finds the data folder, if that is shared, and not this one's memory.
        hot_bytes=settings.hot_bytes if vllm_api.is_on_one_machine(engine_client) else 0,
        reserve_bytes=settings.reserve_bytes,
    )
    catalog = Catalog(settings.catalog_url)
    registry = Registry(
        vllm_api.lora_registry(state),
        engine_client,
        store,
        base_model=served.names[0],
        host_slots=served.limits.host_slots,
        wanted=catalog.refers_to,
    )
    store.protect(registry.holds, catalog.refers_to)
    workers = WorkerSpec.of(
        settings,
        model=served.model,
        hypernetwork=served.hypernetwork,
        rank=served.config.rank,
        max_rank=served.limits.max_rank,
    )
    revisions = Revisions.of(served.model, served.hypernetwork, settings.reading)
    pool = PoolProcess(workers, revisions.name(""), metrics.count_outcome) if settings.hypernetwork_workers else None
    listener = listen(catalog, settings.listen_url)
    return VideoService(settings, revisions, catalog, store, registry, pool, lambda: ending.is_stopping, listener)


def about(settings: Settings, served: ServedModel, engine_client: Any) -> dict[str, Any]:
    """What the console has to know of this server."""
    sizes = vllm_api.engine_sizes(engine_client)
    return {
        "version": version("f2l-vllm"),
        "model": served.names[0],
        "hypernetwork": served.hypernetwork.name,
        "device_slots": sizes.device_slots,
        "host_slots": served.limits.host_slots,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "max_videos": max(1, served.limits.max_rank // served.config.rank - 1),
        "is_chunked": settings.reading.is_chunked,
        "queue_limit": settings.tenant_queue_limit or settings.queue_limit,
        "max_upload_bytes": settings.max_upload_bytes,
        "max_frames_bytes": settings.max_frames_bytes,
        "media_domains": listed(settings.allowed_media_domains),
    }


def answer_from_videos(
    settings: Settings, served: ServedModel, engine_client: Any, state: State, live: LiveStreams, keys: Keys
) -> None:
    """Put our handlers in front of vLLM's."""
    service = live.service
    composer = Composer(
        service.catalog,
        service.store,
        service.registry,
        shapes=served.shapes,
        base_name=served.model.name,
        chunk_rank=served.config.rank,
        max_rank=served.limits.max_rank,
        keep=settings.max_composed,
    )
    asking = Asking(service, composer, live)
    live.prepare = asking.prepare
    vllm_api.leave_adapters_out_of_metrics(engine_client)
    between = separator.find(functools.partial(vllm_api.rendered, state.openai_serving_chat))
    if between:
        vllm_answers.wrap_chat_answers(state, functools.partial(separator.left_out, separator=between))
        vllm_answers.wrap_responses(
            state,
            functools.partial(separator.left_out_of_responses, separator=between),
            functools.partial(separator.left_out_behind, separator=between),
        )
    vllm_api.wrap_servings(
        state,
        openai_serving_chat=lambda inner: ChatHandler(inner, asking, served.names),
        openai_serving_completion=lambda inner: CompletionHandler(inner, asking, served.names),
        openai_serving_responses=lambda inner: ResponsesHandler(inner, asking, served.names),
        anthropic_serving_messages=lambda inner: MessagesHandler(inner, asking, served.names),
    )
    vllm_api.guard_other_servings(state, Guard)
    apart = keys.has_tenants and not settings.share_caches
    vllm_api.enclose_renderings(engine_client, connector.question, salt_of_tenant if apart else lambda given: given)


def hold(home: Path) -> FileLock:
    """Lock the data folder while this process lives, because only one server can know adapters' names and leases.

    Raises:
        ValueError: another server holds it.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / SERVER_LOCK, thread_local=False)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise ValueError(f"another server runs on the data folder {home}: stop it, or set F2L_HOME") from error
    return lock


def salt_of_tenant(given: str | None) -> str:
    """The salt of the caller's prefixes, so that one tenant's questions never find another tenant's cached blocks."""
    return private(asking_tenant.get(), given or "")
