"""Hypernetwork workers as a deployment of Ray Serve: `import_path: f2l_vllm.cluster.workers:build` in a Serve config.

Each replica is a pool of one worker on the replica's node. It takes videos from the catalog, so no request reaches it.
"""

# Annotations are not postponed here: Serve reads that of `build` to make `args` of a config an `Args`.

import asyncio
import logging
from argparse import Namespace
from contextlib import ExitStack

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.deployment import Application, Deployment

from f2l_vllm import logs
from f2l_vllm.cluster.scaling import QueuePolicy
from f2l_vllm.cluster.slot import Slot
from f2l_vllm.pool.actors import Actors
from f2l_vllm.pool.config import PoolConfig
from f2l_vllm.pool.pool import forget_all, open_pool
from f2l_vllm.server.inputs import Inputs
from f2l_vllm.settings import Settings
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.errors import Unavailable

logger = logging.getLogger(__name__)

_LEAVE_SECONDS = 10.0  # beyond the video in work
_PATIENCE_SECONDS = 30.0  # how long a worker may be without work before it goes


class Args(BaseModel):
    """`args` of the application in a Serve config. Settings are `F2L_*` in the environment of Ray's nodes, or in
    `runtime_env`; `F2L_WORKER_CPUS` and `F2L_WORKER_GPUS` are what each worker gets."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("f2l-tiny", description="The engines' model.")
    max_lora_rank: int | None = Field(None, ge=1, description="The engines' --max-lora-rank, if they were given one.")
    least: int = Field(0, ge=0, description="Workers that stay when nothing waits.")
    most: int = Field(4, ge=1, description="Workers at most.")
    videos_per_worker: int = Field(2, ge=1, description="Videos waiting or in work for which there is one more worker.")


def build(args: Args) -> Application:
    """Workers that come with waiting videos, and go when there are none. Serve calls this with `args` of its config.

    Raises:
        ValueError: the settings give a worker no share of a CPU or GPU, which would place it beside its replica.
    """
    settings = Settings.read()
    bundle = {name: share for name, share in (("CPU", settings.worker_cpus), ("GPU", settings.worker_gpus)) if share}
    if not bundle:
        raise ValueError("workers need a share of a CPU or GPU: set F2L_WORKER_CPUS or F2L_WORKER_GPUS above 0")
    autoscaling = AutoscalingConfig(
        min_replicas=args.least,
        max_replicas=args.most,
        initial_replicas=args.least,
        upscale_delay_s=0.5,
        downscale_delay_s=_PATIENCE_SECONDS,
        downscale_to_zero_delay_s=_PATIENCE_SECONDS,
        policy=AutoscalingPolicy(
            policy_function=f"{QueuePolicy.__module__}:{QueuePolicy.__name__}",
            policy_kwargs={"videos_per_worker": args.videos_per_worker},
        ),
    )
    deployment: Deployment = serve.deployment(
        name=Hypernetwork.__name__,
        ray_actor_options={"num_cpus": 0},
        # The worker is an actor of the replica's, on the same node.
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=settings.job_seconds + _LEAVE_SECONDS,
        autoscaling_config=autoscaling,
    )(Hypernetwork)
    return deployment.bind(args.model, args.max_lora_rank)


class Hypernetwork:
    """A replica. What it fetches and makes stays in its folder for the time of a job only. One that is killed leaves
    it, and nobody may come to take its place: the node's other replicas remove it when they start and when they stop.

    Args:
        model, max_lora_rank: as in `Args`.

    Raises:
        ValueError: the settings name no catalog or no store, or the model cannot be used.
    """

    def __init__(self, model: str, max_lora_rank: int | None) -> None:
        logs.configure("worker")
        inputs = Inputs.read(model)
        settings = self._settings = inputs.settings
        if settings.database_url is None or settings.store is None:
            raise ValueError("workers share one catalog and one store: set F2L_DATABASE_URL and F2L_STORE for all")
        self._open = ExitStack()
        slot = self._slot = Slot.take(settings.data_folder / "workers")
        self._open.callback(slot.lock.release)
        self._tidy()
        config = PoolConfig.of(settings, workers=1, keeps=False)
        actors = Actors(config, inputs.workers(Namespace(max_lora_rank=max_lora_rank), slot.folder))
        pool = open_pool(settings, config, actors, slot.folder, inputs.revision, lambda _event: None)
        self._pool = self._open.enter_context(pool)
        self._pool.start()

    def check_health(self) -> None:
        """Serve replaces a replica that has failed.

        Raises:
            RuntimeError: its worker can no longer be started.
        """
        if self._pool.failed.is_set():
            raise RuntimeError(self._pool.why())

    async def __del__(self) -> None:
        """Serve waits for this when it stops a replica: the video in work is finished first."""
        if hasattr(self, "_pool"):
            await asyncio.to_thread(self._pool.finish, self._settings.job_seconds)
            await asyncio.to_thread(self._tidy)
            await asyncio.to_thread(self._open.close)

    def _tidy(self) -> None:
        for folder in self._slot.left():
            try:
                forget_all(open_store(folder, url=self._settings.store))
            except Unavailable as error:
                logger.warning("what a killed worker left in %s is not removed yet: %s", folder, error)
