"""How many videos a memory keeps answerable without a second reading: as adapters, and as KV caches. Counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.costs import Costs
from f2l_vllm.bench.results_file import ResultsFile, Row, Say
from f2l_vllm.bench.shapes import Subject


async def run(suite: suites.Capacity, subject: Subject, folder: Path, results: ResultsFile, say: Say) -> None:
    """A row per number of frames: the bytes of an adapter's file, which an engine also holds in host memory, and of the
    visual tokens' keys and values."""
    costs = Costs(subject)
    room = suite.gb * 1e9
    for frames in suite.frames:
        if results.has(frames=frames):
            continue
        adapter, kv = costs.adapter_bytes, costs.kv_bytes(frames)
        results.add(
            {
                "frames": frames,
                "adapter_bytes": adapter,
                "kv_bytes": kv,
                "adapter_videos": int(room // adapter),
                "kv_videos": int(room // kv),
                "kv_over_adapter": round(kv / adapter, 3),
            }
        )


def derive(rows: list[Row]) -> dict[str, Any]:
    """`larger_from_frames`: the least number of frames whose KV cache is larger than the adapter."""
    row = rows[0]
    return {"larger_from_frames": row["adapter_bytes"] // (row["kv_bytes"] // row["frames"]) + 1}
