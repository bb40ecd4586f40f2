"""`python -m tests.soak.history` (`make soak`): servers of one catalog and one store, harmed for an hour.

Clients upload, ask and delete at random while servers and workers are killed and stopped and PostgreSQL is restarted.
All that they do and hear is recorded, and `checker.py` says whether any of it may not happen. With `--check` a history
that was recorded is checked again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from f2l_vllm import torch_shims

torch_shims.install()

from tests.soak.history import operations  # noqa: E402
from tests.soak.history.checker import violations  # noqa: E402
from tests.soak.history.run import History, as_json, run  # noqa: E402
from tests.support.postgres import needed_postgres  # noqa: E402

_SHOWN = 20
_ROUND_SECONDS = 300.0  # an hour is many histories, each with an end at which nothing may be left


def main() -> int:
    """Make histories, check them, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=None, help="default: by the clock")
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="where the summary goes")
    parser.add_argument("--found", type=Path, default=Path("build/history"), help="where histories at fault go")
    parser.add_argument("--check", type=Path, default=None, help="check this history instead")
    options = parser.parse_args()
    if options.check is not None:
        recorded = operations.read(options.check)
        return _show(History(recorded, violations(recorded)))
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    started, rounds = time.monotonic(), []
    while (left := options.seconds - (time.monotonic() - started)) > 0:
        rounds.append(_round(options, seed + len(rounds), min(left, _ROUND_SECONDS)))
    if options.json is not None:
        summary = {
            "violations": sum(one["violations"] for one in rounds),
            "questions_answered": sum(one["questions_answered"] for one in rounds),
            "rounds": rounds,
            "seconds": round(time.monotonic() - started, 1),
            "configuration": {"seed": seed, "servers": options.servers, "workers": options.workers},
            "versions": {name: version(name) for name in ("f2l-vllm", "vllm", "sqlalchemy", "fastapi", "psycopg")},
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if any(one["violations"] for one in rounds) else 0


def _round(options: argparse.Namespace, seed: int, seconds: float) -> dict[str, object]:
    with needed_postgres() as postgres:
        history = asyncio.run(run(seconds, seed, postgres, servers=options.servers, workers=options.workers))
    if _show(history):
        operations.write(options.found / f"{seed}.jsonl", history.operations)
        print(f"seed {seed}: kept as {options.found / f'{seed}.jsonl'}", flush=True)
    return {"seed": seed, **as_json(history)}


def _show(history: History) -> int:
    for one in history.violations[:_SHOWN]:
        print(f"{one.rule}: {one.text}")
        for operation in one.operations:
            print(f"    {json.dumps({name: value for name, value in asdict(operation).items() if value})}")
    print(json.dumps(as_json(history), indent=1), flush=True)
    return 1 if history.violations else 0


if __name__ == "__main__":
    sys.exit(main())
