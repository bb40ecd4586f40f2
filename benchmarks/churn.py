"""Videos that come and go: publish and delete, thousands of times, through a real catalog and store, and what is left.

python -m benchmarks.churn --cycles 10000 --json benchmarks/results/churn.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Upload, metadata
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.store import Store

_STAGES = (VideoState.DECODING, VideoState.ENCODING, VideoState.PUBLISHING)
_VIDEO_BYTES, _ADAPTER_BYTES = 20_000, 70_000  # as the default model's
_MAINTAIN_EVERY = 100  # cycles between what the server's maintenance does
_KEPT = 20  # videos that stay throughout, each composed with one that goes


def churn(cycles: int, warm_up: int, folder: Path, url: str | None = None) -> dict[str, Any]:
    """Run `cycles` life cycles after `warm_up` of them; what they cost and what they left behind.

    Args:
        cycles: how many videos are uploaded, published, asked about and deleted.
        warm_up: how many before memory is first measured.
        folder: the data folder.
        url: the catalog's database; default: SQLite in the folder.
    """
    catalog = Catalog(url or f"sqlite:///{folder / 'catalog.sqlite3'}")
    store = Store(folder / "home", hot_bytes=8 << 20)
    try:
        kept = [_publish(catalog, store, f"kept-{index}") for index in range(_KEPT)]
        seconds = []
        last_id = 0
        for index in range(-warm_up, cycles):
            if index == 0:
                catalog.purge(time.time())
                before = _state(catalog, store, folder)
                begun = time.perf_counter()
            file_id, name = _publish(catalog, store, str(index))
            composed = f"f2l-c{hashlib.sha256(name.encode()).hexdigest()[:30]}"
            _publish_adapter(store, composed)
            record = catalog.add_composed(composed, [kept[index % _KEPT][1], name], rank=32, size=1, info=AdapterInfo())
            assert record is not None
            assert record.id > last_id, "an id was used twice"
            last_id = record.id
            store.load_path(name)
            catalog.touch({file_id: time.time()}, {name: time.time()})
            deleted = time.perf_counter()
            removal = catalog.remove_file(file_id, "t")
            assert removal is not None
            assert {adapter.name for adapter in removal.orphaned_adapters} == {name, composed}
            _bury(catalog, store)
            seconds.append(time.perf_counter() - deleted)
            if index % _MAINTAIN_EVERY == 0:
                catalog.purge(time.time())
                catalog.drop_abandoned()
                catalog.expire_files(time.time())
        elapsed = time.perf_counter() - begun
        catalog.purge(time.time())
        after = _state(catalog, store, folder)
        for file_id, _ in kept:
            assert catalog.remove_file(file_id, "t") is not None
        _bury(catalog, store)
        catalog.purge(time.time())
        empty = _state(catalog, store, folder)
    finally:
        store.close()
        catalog.close()
    return {
        "cycles": cycles,
        "warm_up": warm_up,
        "cycles_per_second": round(cycles / elapsed, 1),
        "delete_seconds_max": round(max(seconds[warm_up:]), 4),
        "delete_seconds_median": round(sorted(seconds[warm_up:])[cycles // 2], 4),
        "rss_drift": round(after["rss_bytes"] / before["rss_bytes"] - 1, 5),
        "before": before,
        "after": after,
        "when_all_are_deleted": empty,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _bury(catalog: Catalog, store: Store) -> None:
    """Remove from the store what the catalog has forgotten."""
    doomed = catalog.tombstones(1000)
    for one in doomed:
        (store.remove_video if one.is_video else store.remove_adapter)(one.object)
    catalog.bury(doomed)


def _publish(catalog: Catalog, store: Store, text: str) -> tuple[str, str]:
    """Upload a video and do what a worker does; its file id and adapter name."""
    data = hashlib.shake_128(text.encode()).digest(_VIDEO_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    temporary = store.temporary()
    temporary.write_bytes(data)
    video = catalog.reserve_video(sha256)
    store.keep_video(temporary, video.video)
    name = f"f2l-{sha256[:32]}"
    upload = Upload("t", sha256, len(data), "video.mp4", "vision")
    file = catalog.add_file(upload, name, queue_limit=10, video=video)
    (job,) = catalog.claim_jobs(1)
    assert store.fetch_video(job.video).stat().st_size == len(data)
    for stage in _STAGES:
        catalog.advance(job.adapter_name, stage, 0.5)
    _publish_adapter(store, name)
    assert catalog.finish_job(name, rank=16, size=_ADAPTER_BYTES, info=AdapterInfo(frames=8)) is not None
    return file.id, name


def _publish_adapter(store: Store, name: str) -> None:
    def fill(directory: Path) -> None:
        directory.mkdir()
        (directory / "adapter_config.json").write_text("{}")
        (directory / "adapter_model.safetensors").write_bytes(hashlib.shake_128(name.encode()).digest(_ADAPTER_BYTES))

    store.publish_adapter(name, fill, {"info": {}})


def _state(catalog: Catalog, store: Store, folder: Path) -> dict[str, int]:
    """What there is of everything that could be left behind."""
    with catalog._read() as connection:
        tables = metadata.sorted_tables
        rows = {f"rows_{t.name}": connection.scalar(select(func.count()).select_from(t)) or 0 for t in tables}
    home = folder / "home"
    return {
        **rows,
        "files": sum(path.is_file() for path in home.rglob("*")),
        "adapters_in_memory": 0 if store._hot is None else len(store._hot.names()),
        "database_bytes": sum(path.stat().st_size for path in folder.glob("catalog.sqlite3*")),
        "open_files": len(os.listdir("/proc/self/fd")),
        "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=10000)
    parser.add_argument("--warm-up", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = churn(options.cycles, options.warm_up, Path(folder))
    print(json.dumps(results, indent=1))
    if options.json is not None:
        from f2l_vllm.bench import record  # what it imports is no part of the memory measured

        configuration = {"video_bytes": _VIDEO_BYTES, "adapter_bytes": _ADAPTER_BYTES, "kept": _KEPT}
        record.write(options.json, configuration, results)


if __name__ == "__main__":
    main()
