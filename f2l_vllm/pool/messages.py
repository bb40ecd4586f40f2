"""The small frozen records that cross the process boundary between the pool and a worker; nothing else does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.settings import Settings
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.video.decoder import DecodeLimits
from f2l_vllm.video.probe import Limits
from f2l_vllm.video.reading import ReadingOptions


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker loads at start, and how it reads videos. Paths are on a file system shared with the server."""

    model: Path
    hypernetwork: Path
    home: Path
    base_name: str
    max_rank: int
    threads: int
    limits: Limits = field(default_factory=Limits)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    batch_tokens: int = 0
    store: str | None = None
    reserve_bytes: int | None = None
    decode: DecodeLimits = field(default_factory=DecodeLimits)
    gpus: float = 0.0  # for this worker; 0: it computes on the CPU

    @classmethod
    def of(cls, settings: Settings, *, model: Path, hypernetwork: Path, rank: int, max_rank: int) -> WorkerSpec:
        """The spec of workers that make adapters of this `rank` for an engine that takes up to `max_rank`."""
        return cls(
            model=model,
            hypernetwork=hypernetwork,
            home=settings.data_folder,
            store=settings.store,
            reserve_bytes=settings.reserve_bytes,
            base_name=model.name,
            max_rank=max_rank,
            limits=settings.kept_video_limits,
            threads=max(1, int(settings.worker_cpus)),
            # The bias uses as much rank as one chunk.
            reading=replace(settings.reading, max_chunks=max_rank // rank - 1),
            batch_tokens=settings.batch_tokens,
            decode=settings.decode_limits,
            gpus=settings.worker_gpus or 0.0,
        )


@dataclass(frozen=True)
class WorkerInfo:
    """A live worker's description of itself."""

    pid: int
    node: str
    device: str


@dataclass(frozen=True)
class Progress:
    """The worker has reached `state`; `fraction` is 0..1 within it."""

    state: VideoState
    fraction: float


@dataclass(frozen=True)
class Published:
    """The adapter is in the store."""

    rank: int
    bytes: int
    info: AdapterInfo


@dataclass(frozen=True)
class Failed:
    """The video itself is at fault; trying again would fail again."""

    code: str
    message: str


@dataclass(frozen=True)
class Cancelled:
    """The job was given up because the pool said so."""


Event = Progress | Published | Failed | Cancelled
Outcome = Published | Failed | Cancelled
