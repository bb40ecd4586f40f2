"""`f2l-vllm workers`: the hypernetwork workers of one machine, without a server.

They claim jobs from the servers' catalog and put adapters into the servers' store, as the pool of a server does. It is
a command of its own and no role of `serve`, because it takes none of vLLM's flags and `vllm serve` cannot run without
an engine. A data folder that is a cache of a remote store is emptied after each job, so that nothing of a deleted video
is left here.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from filelock import FileLock
from prometheus_client import make_wsgi_app

from f2l_vllm import logs
from f2l_vllm.catalog.database import check_reachable
from f2l_vllm.cli import checks, gpu_shares, gpus
from f2l_vllm.pool.config import PoolConfig, prepare_ray
from f2l_vllm.pool.messages import Event, Failed, Published, WorkerSpec
from f2l_vllm.server import metrics
from f2l_vllm.server.inputs import Inputs
from f2l_vllm.settings import SERVER_LOCK, Settings, refuse_environment

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.1


@dataclass(frozen=True)
class Workers:
    """What the workers load, and the revision of models and sampling for which they work."""

    settings: Settings
    spec: WorkerSpec
    revision: str


def plan(model: str, settings: dict[str, str], max_lora_rank: int | None = None) -> Workers:
    """The workers of servers with this model and these settings.

    Args:
        settings: the values of flags, as environment variables.
        max_lora_rank: that of the servers; None: they were not given one.

    Raises:
        ValueError: as `serve.plan` does, or there would be no worker.
    """
    refuse_environment(os.environ)
    inputs = Inputs.read(model, settings)
    if not inputs.settings.hypernetwork_workers:
        raise ValueError("--hypernetwork-workers 0 is for servers: give 1 or more here")
    found, chosen = gpus.find(), inputs.settings
    checks.check_workers(chosen, found.count)
    if found.count and chosen.worker_gpus is None and chosen.ray_address is None:
        need, count = gpu_shares.worker_bytes(inputs.model, inputs.hypernetwork), chosen.hypernetwork_workers
        share = gpu_shares.divide(
            found, workers=count, need=need, asked=None, engine_gpus=0, part=chosen.gpu_share
        ).worker
        inputs = replace(inputs, settings=chosen.model_copy(update={"worker_gpus": share}))
    return Workers(inputs.settings, inputs.workers(Namespace(max_lora_rank=max_lora_rank)), inputs.revision)


def run(workers: Workers, host: str, port: int | None) -> int:
    """Make adapters until SIGTERM or Ctrl-C; the exit code is 0 unless workers can no longer be started.

    Args:
        port: where `/health`, `/ready` and `/metrics` are answered; None: nowhere.

    Raises:
        ValueError: something on this machine prevents it.
        Unavailable: catalog or store cannot be opened.
    """
    settings = workers.settings
    _check_now(settings, host, port)
    logs.configure("workers")
    os.environ.update(gpus.drivers_order())
    prepare_ray(settings)
    # These read the environment when they are imported.
    from f2l_vllm.pool.actors import Actors
    from f2l_vllm.pool.pool import open_pool

    logs.adopt("ray", "transformers")
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    config = PoolConfig.of(settings, keeps=settings.store is None)
    actors = Actors(config, workers.spec)
    home = settings.data_folder
    # Without a remote store the data folder is the server's own.
    lock = nullcontext() if config.keeps else FileLock(home / SERVER_LOCK, timeout=0)
    with lock, open_pool(settings, config, actors, home, workers.revision, _count) as pool:
        if port is not None:
            _answer(pool, host, port)
        waited = False
        while not told.is_set() and not pool.start(wait_seconds=1.0):
            if not waited:
                logger.info("another pool has the data folder %s: it is waited for", home)
            waited = True
        while not told.wait(_TICK_SECONDS) and not pool.failed.is_set():
            metrics.WORKERS.set(len(pool.workers()))
        if told.is_set():
            logger.info("told to stop: what is in work is finished first, within %g s", settings.job_seconds)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.default_int_handler)
            with suppress(KeyboardInterrupt):
                pool.finish(settings.job_seconds)
    logger.info("stopped")
    return int(pool.failed.is_set())


def _check_now(settings: Settings, host: str, port: int | None) -> None:
    if port is not None:
        checks.check_listening(host, port)
    if settings.store is not None:
        checks.check_folder(settings.data_folder)
    check_reachable(settings.catalog_url)


def _count(event: Event) -> None:
    if isinstance(event, Published):
        metrics.count_outcome("published", event.info.seconds)
    elif isinstance(event, Failed):
        metrics.count_outcome("failed", {})


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Supervisors ask all the time."""


def _answer(pool: Any, host: str, port: int) -> None:
    """Answer in a thread: `/health` while this process runs, `/ready` while a worker is loaded, and `/metrics`."""
    page = make_wsgi_app()

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return page(environ, start_response)
        status, text = "404 Not Found", "there are /health, /ready and /metrics"
        if path == "/ready" and not (pool.workers() and pool.is_needed):
            status, text = "503 Service Unavailable", pool.why() or "no worker has been loaded yet"
        elif path in ("/health", "/ready"):
            status, text = "200 OK", "ok"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    server = make_server(host, port, answer, _Server, _Quiet)
    threading.Thread(target=server.serve_forever, name="f2l-answer", daemon=True).start()
