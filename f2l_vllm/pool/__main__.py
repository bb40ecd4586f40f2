"""`python -m f2l_vllm.pool SPEC`: the pool in its own process, so that Ray and the server do not end each other.

The process loads its workers. They take jobs once it has read `begin` and a revision from standard input and no other
pool holds the data folder. It runs until standard input closes, which means that its server has gone. It prints one
JSON object per line: `{"workers": N}` when that number changes, `{"why": …}` when there is no worker and the reason is
new, and `{"outcome": …, "seconds": {…}}` when a job ends. Everything else, jobs and their states, is in the catalog.
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
_STOP_SECONDS = 4.0  # from the end of standard input to the end of this process, at the latest


def main(spec_json: str) -> int:
    """Run the pool; the exit code is 0 unless workers cannot be started, or no longer."""
    told, orphaned = threading.Event(), threading.Event()
    words: list[str] = []
    threading.Thread(target=_listen, args=(told, orphaned, words), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: None)  # a supervisor may send it to all; the server decides when to stop

    logs.configure("pool")
    # These imports take seconds, and the server may end meanwhile.
    from pydantic import TypeAdapter

    from f2l_vllm.pool.config import PoolConfig, prepare_ray
    from f2l_vllm.settings import Settings

    settings = Settings()
    prepare_ray(settings)

    from f2l_vllm.pool.actors import Actors
    from f2l_vllm.pool.messages import Event, Failed, Published, WorkerSpec
    from f2l_vllm.pool.pool import open_pool

    logs.adopt("ray", "transformers")
    spec = TypeAdapter(WorkerSpec).validate_json(spec_json)

    def say(**message: Any) -> None:
        with suppress(BrokenPipeError):  # the server is gone, but no job may be lost for that
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    def on_event(event: Event) -> None:
        if isinstance(event, Published):
            say(outcome="published", seconds=event.info.seconds)
        elif isinstance(event, Failed):
            say(outcome="failed", seconds={})

    config = PoolConfig.of(settings)
    actors = Actors(config, spec)
    try:
        actors.start_ahead()
    except Exception as error:  # of Ray, which a busy machine may start more slowly than Ray waits for
        say(why=f"Ray cannot be used: {error}")
        return 1
    told.wait()
    if orphaned.is_set():
        actors.disconnect()
        return 0
    with open_pool(settings, config, actors, spec.home, words[1], on_event) as pool:
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
    return int(pool.failed.is_set())


def _listen(told: threading.Event, orphaned: threading.Event, words: list[str]) -> None:
    while message := os.read(sys.stdin.fileno(), 4096):  # the only message is `begin` and a revision
        words += message.decode().split()
        told.set()
    faulthandler.dump_traceback_later(_STOP_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    orphaned.set()
    told.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
