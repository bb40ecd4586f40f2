"""A worker of a history: it claims jobs, and makes adapters that say which bytes they were made from."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Job
from f2l_vllm.catalog.tombstones import LOST
from f2l_vllm.files import lasting_name
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import Store, StoreError
from tests.soak.history import pace
from tests.soak.history.server import RANK, REVISIONS, WEIGHTS, Place

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 0.2
_FILLER = "0" * 8192


def make(catalog: Catalog, store: Store, job: Job, most_seconds: float) -> None:
    """What a lane and its worker do with a job, in the order in which they do it, each stage so long at most."""
    name, mine = job.adapter_name, {"token": job.token}
    _insist(lambda: catalog.advance(name, VideoState.DECODING, 0.0, **mine))
    try:
        path = store.fetch_video(job.video)
        _pause(most_seconds)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except StoreError as error:
        message = str(error)
        _insist(lambda: catalog.fail_job(name, LOST, message, generation=job.generation, **mine))
        return
    except FileNotFoundError:  # deleted while it was read
        _insist(lambda: catalog.release_job(name, blameless=True, **mine))
        return
    _insist(lambda: catalog.advance(name, VideoState.PUBLISHING, 0.0, **mine))

    def write(directory: Path) -> None:
        directory.mkdir()
        (directory / WEIGHTS).write_text(f"{digest}\n{_FILLER}")
        (directory / "config.json").write_text("{}")
        _pause(most_seconds)

    store.publish_adapter(job.object, write, {})
    _pause(most_seconds)
    entered = _insist(lambda: catalog.finish_job(name, rank=2 * RANK, size=len(_FILLER), info=AdapterInfo(), **mine))
    if entered is None:
        logger.warning("%s is refused: the job is another worker's", job.object)
        store.remove_adapter(job.object)


def work(place: Place) -> None:
    """Do jobs until killed."""
    place.take()
    store = open_store(place.home, url=place.store)
    pace.put_far(store, place.store_seconds)
    catalog = _opened(place.database)
    catalog.pool, catalog.revision = lasting_name(place.home / "pool.name"), REVISIONS.name("")
    _insist(catalog.beat)
    _insist(lambda: catalog.release_all_jobs(blameless=False))
    threading.Thread(target=_beat_on, args=(catalog,), daemon=True).start()
    while True:
        try:
            jobs = catalog.claim_jobs(1)
        except Unavailable:
            jobs = []
            time.sleep(_AGAIN_SECONDS)
        for job in jobs:
            try:
                make(catalog, store, job, place.stage_seconds)
            except Unavailable:
                _insist(lambda job=job: catalog.release_job(job.adapter_name, blameless=True, token=job.token))
        if not jobs:
            time.sleep(0.02)


def _opened(database: str) -> Catalog:
    while True:
        with suppress(Unavailable):
            return Catalog(database)
        time.sleep(_AGAIN_SECONDS)


def _beat_on(catalog: Catalog) -> None:
    while True:
        with suppress(Unavailable):
            catalog.beat()
        time.sleep(pace.BEAT_SECONDS)


def _insist(enter: Callable[[], Any]) -> Any:
    """Enter what became of a job, and try again while the catalog is busy or away."""
    while True:
        with suppress(Unavailable):
            return enter()
        time.sleep(_AGAIN_SECONDS)


def _pause(most_seconds: float) -> None:
    time.sleep(random.uniform(0, most_seconds))
