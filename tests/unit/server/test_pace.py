"""Who holds up the event loop waits, so that others have their turn."""

import asyncio
import itertools
import time

import pytest

from f2l_vllm.server.middleware.pace import Pace
from tests.unit.server.test_bodies import bodies


async def taken(pace: Pace, tenant: str, seconds: float) -> None:
    await pace.turn(tenant)
    with pace.taking(tenant, 0):
        time.sleep(seconds)


def test_who_held_up_the_loop_waits_and_nobody_else():
    async def run() -> None:
        pace = Pace()
        await taken(pace, "attacker", 0.2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pace.turn("attacker"), 0.1)
        await asyncio.wait_for(pace.turn("other"), 0.1)
        await pace.turn("attacker")
        assert pace._next == {}

    asyncio.run(run())


def test_what_is_brief_costs_no_turn():
    async def run() -> None:
        pace = Pace()
        with pace.taking("asker", 20_000):
            pass
        assert pace._next == {}

    asyncio.run(run())


def test_a_large_body_costs_a_turn_though_it_is_read_in_no_time():
    """A picture's base64 is one string, parsed at once; its bytes are copied, checked and decoded later."""

    async def run() -> None:
        pace = Pace()
        with pace.taking("attacker", 20_000_000):
            pass
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pace.turn("attacker"), 0.3)
        await asyncio.wait_for(pace.turn("other"), 0.1)

    asyncio.run(run())


def test_large_bodies_of_one_tenant_come_one_after_the_other():
    """Eight at once: between two of them others have at least twice the time that one has taken."""
    spans: list[tuple[float, float]] = []

    async def run() -> None:
        app = bodies(max_body_bytes=1 << 20)
        inner = app._app  # within `Faults`
        admitted = inner._admitted

        def slow(*args: object) -> object:
            began = time.monotonic()
            time.sleep(0.02)
            spans.append((began, time.monotonic()))
            return admitted(*args)

        inner._admitted = slow
        scope = {"type": "http", "method": "POST", "path": "/any", "query_string": b"", "root_path": ""}
        headers = [(b"content-type", b"application/json")]

        async def ask() -> None:
            async def receive() -> dict:
                return {"type": "http.request", "body": b'"' + b"x" * 20_000 + b'"', "more_body": False}

            async def send(_message: dict) -> None: ...

            await app({**scope, "headers": headers, "state": {"tenant": "attacker"}}, receive, send)

        await asyncio.gather(*(ask() for _ in range(8)))

    asyncio.run(run())
    assert len(spans) == 8
    for (began, ended), (later, _) in itertools.pairwise(spans):
        assert later - ended > 2 * (ended - began)
