"""`python -m f2l_vllm.pool SPEC`: the pool as a process of its own, so that Ray's life and the server's are apart.

Loads its workers, and once it reads `begin` from standard input has them take jobs, when no other pool has the data
folder any more. Runs until standard input closes, which is how it learns that its server has gone. Says one JSON object
a line: `{"workers": N}` when that changes, `{"why": …}` when there is none for another reason than before,
`{"outcome": …, "seconds": {…}}` when a job ends. Everything else, jobs and their states, is in the catalog.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any

from f2l_vllm import logs

_TICK_SECONDS = 0.1
_BUSY_SECONDS = 60.0  # nobody waits for an answer here, and work is lost if a result cannot be entered
_STOP_SECONDS = 4.0  # from the end of standard input to the end of this process, whatever is in the way


def main(spec_json: str) -> int:
    """Run the pool; the exit code is 0 unless workers could not be started any more."""
    told, orphaned = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(told, orphaned), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: None)  # a supervisor may send it to all; the server says when to stop

    logs.configure("pool")
    # What follows takes seconds, in which the server may end.
    from pydantic import TypeAdapter

    from f2l_vllm.settings import Settings

    settings = Settings()
    if settings.ray_address is None:
        # Ray's switch for a cluster that nobody joins: every part of it listens on loopback. Read when it is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a lane that is late at the end would start another Ray

    from f2l_vllm.catalog.catalog import Catalog
    from f2l_vllm.pool.actors import Actors
    from f2l_vllm.pool.config import PoolConfig
    from f2l_vllm.pool.messages import Event, Failed, Published, WorkerSpec
    from f2l_vllm.pool.pool import Pool
    from f2l_vllm.store.cached_store import open_store

    logs.adopt("ray", "transformers")
    spec = TypeAdapter(WorkerSpec).validate_json(spec_json)

    def say(**message: Any) -> None:
        with suppress(BrokenPipeError):  # the server is gone: no reason for a job to be lost
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    def on_event(event: Event) -> None:
        if isinstance(event, Published):
            say(outcome="published", seconds=event.info.get("seconds", {}))
        elif isinstance(event, Failed):
            say(outcome="failed", seconds={})

    config = PoolConfig.of(settings)
    actors = Actors(config, spec)
    actors.start_ahead()
    told.wait()
    if orphaned.is_set():
        actors.disconnect()
        return 0
    catalog = Catalog(settings.catalog_url, busy_seconds=_BUSY_SECONDS)
    store = open_store(
        spec.home, url=settings.store, hot_bytes=settings.hot_bytes, reserve_bytes=settings.reserve_bytes
    )
    pool = Pool(config, actors, catalog, store, on_event)
    waited = False
    while not orphaned.is_set() and not pool.start(wait_seconds=1.0):
        if not waited:
            say(why="another pool has the data folder")
        waited = True
    known, why = -1, ""
    while not orphaned.wait(_TICK_SECONDS) and not pool.failed.is_set():
        if (workers := len(pool.workers())) != known:
            known = workers
            say(workers=workers)
        if not workers and (reason := pool.why()) and reason != why:
            why = reason
            say(why=why)
    pool.stop()
    catalog.close()
    return int(pool.failed.is_set())


def _listen(told: threading.Event, orphaned: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # there is one thing to be told
        told.set()
    faulthandler.dump_traceback_later(_STOP_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    orphaned.set()
    told.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
