"""What the settings tell a pool."""

from __future__ import annotations

import os
from dataclasses import dataclass

from f2l_vllm.settings import Settings


@dataclass(frozen=True)
class PoolConfig:
    """How many workers a pool has, what Ray reserves for each, in which cluster they run (None: a private one), how
    many jobs each takes at a time, whether what was fetched and made stays in a data folder that is a cache, and
    whether a worker decodes the next video while it reads one."""

    workers: int
    cpus: float
    gpus: float
    ray_address: str | None
    job_attempts: int
    job_seconds: float
    batch: int = 1
    keeps: bool = True
    looks_ahead: bool = True

    @classmethod
    def of(cls, settings: Settings, *, workers: int | None = None, keeps: bool = True) -> PoolConfig:
        """`workers`: how many; None: as many as the settings say."""
        return cls(
            workers=settings.hypernetwork_workers if workers is None else workers,
            cpus=settings.worker_cpus,
            gpus=settings.worker_gpus or 0.0,
            ray_address=settings.ray_address,
            job_attempts=settings.job_attempts,
            job_seconds=settings.job_seconds,
            # Chunked videos are long: each one fills a pass by itself.
            batch=settings.batch_videos if settings.batch_tokens and not settings.reading.is_chunked else 1,
            keeps=keeps,
            looks_ahead=not settings.reading.is_chunked,
        )


def prepare_ray(settings: Settings) -> None:
    """Set what Ray reads from the environment when it is imported."""
    if settings.ray_address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for a cluster that nobody joins: all listen on loopback
        if settings.worker_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = settings.worker_devices
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # otherwise a lane that is slow to stop would start another Ray
