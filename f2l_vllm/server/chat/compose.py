"""Composes several videos, or some chunks of one, into one adapter, in rank space and from existing adapters.

A composition is an adapter like any other: content-addressed, published in the store, resident and leased while a
question uses it. The catalog holds it with the adapters it is made of, and drops it with the first of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import AdapterRecord
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE, compose_tensors, save_tensors
from f2l_vllm.hypernetwork.peft_format import AdapterFiles, validate_adapter
from f2l_vllm.hypernetwork.ranks import most_chunks, smallest_rank
from f2l_vllm.server import metrics
from f2l_vllm.server.chat.request import Span
from f2l_vllm.server.errors import APIError, bad_request
from f2l_vllm.server.registry import AdapterLost, Lease, Registry
from f2l_vllm.server.single_flight import once
from f2l_vllm.store.adapter_info import AdapterInfo, Part
from f2l_vllm.store.address import ADAPTER_PREFIX, FORMAT_VERSION
from f2l_vllm.store.store import Store, StoreError

logger = logging.getLogger(__name__)
# Chunks begin and end on frames, so a span may reach this many seconds into a chunk that the caller did not mean.
_SLIVER_SECONDS = 0.1
_ATTEMPTS = 3


class PartLost(AdapterLost):
    """An adapter to compose is missing or damaged; `record` says which."""

    def __init__(self, record: AdapterRecord, error: Exception) -> None:
        super().__init__(str(error))
        self.record = record


class PartGone(RuntimeError):
    """An adapter left the catalog, or was made again, while it was composed with others."""


@dataclass(frozen=True)
class AdapterChunks:
    """Chunks of one video's adapter. `covered`: the seconds they were read from, one (start, end) per stretch."""

    record: AdapterRecord
    chunks: tuple[int, ...]
    covered: tuple[tuple[float, float], ...]

    @property
    def visual_tokens(self) -> int:
        """How many visual tokens the chunks replace: those of the frames inside them."""
        info = self.record.info
        tokens, times = info.visual_tokens, info.timestamps
        inside = sum(any(start <= time < end for start, end in self.covered) for time in times)
        return round(tokens * inside / len(times)) if times and len(self.chunks) < len(info.spans) else tokens


class Composer:
    """Chooses chunks, composes them once for all concurrent callers, and leases the result."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        registry: Registry,
        *,
        shapes: BaseShapes,
        base_name: str,
        chunk_rank: int,
        max_rank: int,
        keep: int,
    ) -> None:
        """`chunk_rank`: the hypernetwork's; `max_rank`: the engine's; `keep`: how many compositions are kept."""
        self._catalog, self._store, self._registry = catalog, store, registry
        self._shapes, self._base_name = shapes, base_name
        self._chunk_rank, self._max_rank, self._keep = chunk_rank, max_rank, keep
        self._making: dict[str, asyncio.Task[AdapterRecord]] = {}

    def choose(self, record: AdapterRecord, span: Span | None, name: str) -> AdapterChunks:
        """The chunks of a video's adapter that overlap the span; all chunks without a span.

        Raises:
            APIError: `span_not_available`: the video was read in one pass, or has no such seconds.
        """
        spans = record.info.spans
        if span is not None and span.last is not None:
            span = Span(max(0.0, record.info.duration_s - span.last))
        if span is None:
            whole = _joined(spans) or ((0.0, record.info.duration_s),)
            return AdapterChunks(record, tuple(range(self.count(record))), whole)
        if not spans:
            message = (
                f"Video '{name}' was read in one pass and cannot be asked about in part: leave out start and end, or "
                "start the server with --chunk-seconds and upload the video again."
            )
            raise bad_request("span_not_available", message, "messages")
        chosen = [i for i, (start, end) in enumerate(spans) if _overlap(start, end, span) > _SLIVER_SECONDS]
        chosen = chosen or [i for i, (start, end) in enumerate(spans) if _overlap(start, end, span) > 0]
        if not chosen:
            there = ", ".join(f"{start:g} to {end:g}" for start, end in spans)
            message = (
                f"Video '{name}' has nothing between {span.start:g} and {span.end:g} s; its chunks are {there} s. "
                "Ask about a span that overlaps one of them."
            )
            raise bad_request("span_not_available", message, "messages")
        return AdapterChunks(record, tuple(chosen), _joined([spans[i] for i in chosen]))

    @property
    def most(self) -> int:
        """How many chunks the engine has room for at once."""
        return max(1, self._max_rank // self._chunk_rank - 1)

    def count(self, record: AdapterRecord) -> int:
        """How many chunks an adapter has."""
        return record.rank // self._chunk_rank - 1

    def check(self, chunks: int, videos: int) -> None:
        """Check that the engine has room for this many chunks at once.

        Raises:
            APIError: `too_many_videos`.
        """
        needed = (chunks + 1) * self._chunk_rank
        if needed > self._max_rank:
            what = f"{videos} videos" if videos > 1 else "this video"
            allowed, most = smallest_rank(needed), most_chunks(self._chunk_rank)
            room = f"no server has room for more than {most}"
            if allowed is not None:
                room = f"or start it with --max-chunks {chunks} (and --max-lora-rank {allowed}, if that is given)"
            message = (
                f"{what[0].upper()}{what[1:]} of {chunks} chunks need LoRA rank {needed}, and this server has "
                f"{self._max_rank}: ask about fewer or shorter ones, {room}."
            )
            raise bad_request("too_many_videos", message, "messages")

    async def lease(self, parts: Sequence[AdapterChunks]) -> Lease:
        """The adapter of these parts in this order, resident and held for one question.

        Raises:
            APIError: `too_many_videos`.
            PartLost: a part is missing or damaged.
            PartGone: a part left the catalog meanwhile.
        """
        parts = _each_chunk_once(parts)
        self.check(sum(len(part.chunks) for part in parts), len(parts))
        only = parts[0].record
        if len(parts) == 1 and len(parts[0].chunks) == self.count(only):
            try:
                return await self._registry.acquire(only)
            except AdapterLost as error:
                raise PartLost(only, error) from error
        name = composition_name(parts)
        record = await asyncio.to_thread(self._catalog.adapter, name)
        for _ in range(_ATTEMPTS):
            if record is not None:
                try:
                    return await self._registry.acquire(record)
                except AdapterLost as error:
                    logger.warning("composing again: %s", error)
            record = await once(self._making, name, lambda: self._compose(name, parts))
        message = "The videos' adapter is damaged each time it is composed: check the disk that holds F2L_HOME."
        raise APIError(HTTPStatus.INTERNAL_SERVER_ERROR, "adapter_damaged", message)

    async def _compose(self, name: str, parts: Sequence[AdapterChunks]) -> AdapterRecord:
        # Parts are read as files, not leased, because places in the engine are for adapters that answer.
        files = await asyncio.to_thread(self._publish, name, parts)
        info = AdapterInfo(visual_tokens=sum(part.visual_tokens for part in parts), parts=_described(parts))
        names = [part.record.name for part in parts]
        record = await asyncio.to_thread(
            self._catalog.add_composed, name, names, rank=files.rank, size=files.bytes, info=info
        )
        if record is None:
            await asyncio.to_thread(self._store.remove_adapter, name)
            raise PartGone
        metrics.COMPOSED.inc()
        await self._trim()
        return record

    async def _trim(self) -> None:
        for old in await asyncio.to_thread(self._catalog.oldest_composed, self._keep):
            for removed in await asyncio.to_thread(self._catalog.remove_composed, old.name):
                await self._registry.remove(removed)

    def _publish(self, name: str, parts: Sequence[AdapterChunks]) -> AdapterFiles:
        """Runs in a thread."""

        files: AdapterFiles

        def write(directory: Path) -> Mapping[str, str]:
            nonlocal files
            tensors = {part.record.name: self._read(part.record) for part in parts}
            composed = compose_tensors([(tensors[p.record.name], p.chunks) for p in parts], self._chunk_rank)
            save_tensors(composed, directory, self._base_name)
            files = validate_adapter(directory, self._shapes, max_rank=self._max_rank)
            return files.sha256

        manifest = {"base_model": self._base_name, "info": AdapterInfo(parts=_described(parts)).to_json()}
        self._store.publish_adapter(name, write, manifest)
        return files

    def _read(self, record: AdapterRecord) -> dict[str, Any]:
        try:
            self._store.verify_adapter(record.object)
            return load_file(self._store.adapter_path(record.object) / WEIGHTS_FILE)
        except (StoreError, OSError) as error:
            raise PartLost(record, error) from error


def composition_name(parts: Sequence[AdapterChunks]) -> str:
    """The composition's content-addressed name: a hash of its parts' names and chunks, in order, and the format."""
    record = {"format": FORMAT_VERSION, "composed": [[part.record.name, list(part.chunks)] for part in parts]}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return ADAPTER_PREFIX + hashlib.sha256(text.encode()).hexdigest()[:32]


def _each_chunk_once(parts: Sequence[AdapterChunks]) -> list[AdapterChunks]:
    """Drop chunks that an earlier part already holds, because a repeated chunk would count twice."""
    seen: set[tuple[str, int]] = set()
    left = []
    for part in parts:
        chunks = tuple(chunk for chunk in part.chunks if (part.record.name, chunk) not in seen)
        seen |= {(part.record.name, chunk) for chunk in chunks}
        if chunks:
            left.append(AdapterChunks(part.record, chunks, part.covered))
    return left


def _described(parts: Sequence[AdapterChunks]) -> tuple[Part, ...]:
    return tuple(Part(part.record.name, part.chunks, part.covered) for part in parts)


def _overlap(start: float, end: float, span: Span) -> float:
    return min(end, span.end) - max(start, span.start)


def _joined(spans: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Merge neighbouring spans."""
    joined: list[tuple[float, float]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
