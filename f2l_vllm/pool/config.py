"""What the settings tell a pool."""

from __future__ import annotations

from dataclasses import dataclass

from f2l_vllm.settings import Settings


@dataclass(frozen=True)
class PoolConfig:
    """How many workers a pool has, what Ray reserves for each, in which cluster they run (None: a private one), and how
    many jobs each takes at a time."""

    workers: int
    cpus: float
    gpus: float
    ray_address: str | None
    job_attempts: int
    job_seconds: float
    batch: int = 1

    @classmethod
    def of(cls, settings: Settings) -> PoolConfig:
        return cls(
            workers=settings.hypernetwork_workers,
            cpus=settings.worker_cpus,
            gpus=settings.worker_gpus,
            ray_address=settings.ray_address,
            job_attempts=settings.job_attempts,
            job_seconds=settings.job_seconds,
            # Chunked videos are long: each one fills a pass by itself.
            batch=settings.batch_videos if settings.batch_tokens and not settings.reading.is_chunked else 1,
        )
