"""`python -m tests.soak.fuzz` (`make fuzz`): one server of the default model, attacked for minutes.

Schemathesis makes requests from the server's own OpenAPI document; the others are mutations of valid ones. Every answer
is judged (`judge.py`), and every second the server has to answer a question of another tenant's. What is at fault is
kept, with the seed, so that it can be sent again, and the exit code says whether there was any.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import platform
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed

from f2l_vllm.server_process import ServerProcess
from tests.soak.fuzz.judge import fault
from tests.soak.fuzz.mutate import mutated
from tests.soak.fuzz.seeds import seeds
from tests.soak.fuzz.wire import Answer, Input, send
from tests.support.videos import write_video

MODEL = "f2l-tiny"
ATTACKER, OTHER = "key-of-the-attacker", "key-of-the-other"
AT_ONCE = 4
DEADLINE = 90.0  # seconds for an answer; more is a hang
SCHEMA_SHARE = 0.25  # of the time
FAULTS = ("5xx", "crash", "hang", "leak")


class Findings:
    """What was sent, what came back, and what was wrong with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.statuses: Counter[int] = Counter()
        self.sources: Counter[str] = Counter()
        self.faults: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
        self.slowest = 0.0

    def note(self, source: str, sent: Input, answer: Answer) -> None:
        """Judge an answer, and keep the input where it is at fault."""
        self.sources[source] += 1
        self.statuses[answer.status] += 1
        self.slowest = max(self.slowest, answer.seconds)
        wrong = fault(sent, answer)
        if wrong is None:
            return
        self.faults[wrong] += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        record = {**sent.as_json(), "fault": wrong, "status": answer.status, "answer": answer.body[:2000]}
        path = self._folder / f"{wrong}-{self.faults[wrong]}.json"
        path.write_text(json.dumps(record, indent=1))
        print(f"{wrong}: {sent.name}, status {answer.status}, kept as {path}: {answer.body[:200]!r}", flush=True)


async def attack(port: int, findings: Findings, given_seeds: list[Input], chance: Random, seconds: float) -> None:
    """Send mutations for so long, some at once, while another tenant asks."""
    end = time.monotonic() + seconds

    async def sender() -> None:
        while time.monotonic() < end:
            sent = mutated(chance.choice(given_seeds), given_seeds, chance)
            findings.note("mutations", sent, await send(port, ATTACKER, sent, DEADLINE))

    async def asker() -> None:
        while time.monotonic() < end:
            await ask(port, findings)
            await asyncio.sleep(1)

    await asyncio.gather(*(sender() for _ in range(AT_ONCE)), asker())


async def ask(port: int, findings: Findings) -> None:
    """A plain question of another tenant's, which has to be answered."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "What is shown?"}], "max_tokens": 2}
    question = Input("question", "POST", "/v1/chat/completions", {"Content-Type": "application/json"})
    question = question.with_body(json.dumps(body).encode())
    answer = await send(port, OTHER, question, DEADLINE)
    findings.note("questions", question, answer if answer.status == 200 else Answer(0, body=answer.body))


def by_schema(port: int, findings: Findings, seed: int, seconds: float) -> None:
    """Requests from the OpenAPI document of all routes, an even share of the time for each."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", headers=_auth(ATTACKER))
    operations = [operation.ok() for operation in schema.get_all_operations()]
    for operation in operations:
        _one_operation(operation, port, findings, seed, time.monotonic() + seconds / len(operations))


def _one_operation(operation: Any, port: int, findings: Findings, seed: int, end: float) -> None:
    @hypothesis_seed(seed)
    @settings(
        max_examples=100_000,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def send_one(case: Any) -> None:
        if time.monotonic() > end:
            raise TimeoutError
        request = case.as_transport_kwargs(base_url=f"http://127.0.0.1:{port}")
        prepared = httpx.Request(
            request["method"],
            request["url"],
            **{key: request[key] for key in ("params", "json", "headers", "cookies") if request.get(key)},
            content=request.get("data") if isinstance(request.get("data"), str | bytes) else None,
        )
        skipped = ("host", "connection", "content-length", "transfer-encoding")
        headers = {name: value for name, value in prepared.headers.items() if name not in skipped}
        path = prepared.url.raw_path.decode("ascii")
        sent = Input(f"schema {operation.label}", prepared.method, path, headers, prepared.read())
        findings.note("schema", sent, asyncio.run(send(port, ATTACKER, sent, DEADLINE)))

    with suppress(TimeoutError, ValueError, TypeError):  # what its generator cannot write as HTTP is no input
        send_one()


def main() -> int:
    """Start, attack, stop, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="default: by the clock")
    parser.add_argument("--json", type=Path, default=None, help="where the summary goes")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="where inputs at fault go")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        tenants = Path(folder) / "tenants.json"
        tenants.write_text(json.dumps({"attacker": [ATTACKER], "other": [OTHER]}))
        environment = {"F2L_TENANTS": str(tenants), "F2L_EXTRA_ROUTES": "/openapi.json"}
        server = ServerProcess(MODEL, Path(folder) / "home", env=environment)
        try:
            server.wait_ready()
            return _run(server, options, seed, Findings(options.found))
        finally:
            server.end()


def _run(server: ServerProcess, options: argparse.Namespace, seed: int, findings: Findings) -> int:
    port = httpx.URL(server.url).port or 0
    video = write_video(server.home.parent / "video.mp4", frames=8, fps=8, size=(64, 48)).read_bytes()
    client = httpx.Client(base_url=server.url, headers=_auth(ATTACKER), timeout=DEADLINE)
    uploaded = client.post("/v1/files", files={"file": ("a.mp4", video)}, data={"purpose": "vision"}).json()["id"]
    while client.get(f"/v1/files/{uploaded}").json()["status"] == "uploaded":
        time.sleep(0.1)
    client.post(f"/v1/files/{uploaded}", json={"f2l": {"pinned": True}})
    started = time.monotonic()
    by_schema(port, findings, seed, SCHEMA_SHARE * options.seconds)
    left = options.seconds - (time.monotonic() - started)
    asyncio.run(attack(port, findings, seeds(MODEL, uploaded, video), Random(seed), left))
    alive = server.process.poll() is None and httpx.get(f"{server.url}/ready", timeout=DEADLINE).status_code == 200
    findings.faults["crash"] += not alive
    inputs = sum(findings.sources.values())
    summary = {
        "inputs": inputs,
        **{name: findings.faults[name] for name in FAULTS},
        "sources": dict(findings.sources),
        "statuses": {str(status): count for status, count in sorted(findings.statuses.items())},
        "seconds": round(time.monotonic() - started, 1),
        "slowest_answer_seconds": round(findings.slowest, 2),
        "configuration": {"model": MODEL, "seed": seed, "at_once": AT_ONCE, "deadline_seconds": DEADLINE},
        "versions": {name: version(name) for name in ("f2l-vllm", "vllm", "schemathesis", "hypothesis", "fastapi")},
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{inputs} inputs: " + ", ".join(f"{findings.faults[name]} {name}" for name in FAULTS))
    return 1 if any(findings.faults[name] for name in FAULTS) else 0


def _auth(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


if __name__ == "__main__":
    sys.exit(main())
