"""Servers with the keys of their catalog: a new one works everywhere, a revoked one nowhere."""

import asyncio
import contextlib
import threading
import time

import httpx
import pytest
from sqlalchemy import event
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from typer.testing import CliRunner

from f2l_vllm.catalog.keys import key_hash
from f2l_vllm.catalog.servers import SERVER_SECONDS
from f2l_vllm.cli import keys as command
from f2l_vllm.cli.main import app
from f2l_vllm.server.middleware.auth import AuthMiddleware
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.server.videos import forgetting
from f2l_vllm.store.errors import CatalogBusy
from tests.unit.server.test_forgetting import Server


async def _who(request: Request) -> PlainTextResponse:
    return PlainTextResponse(tenant_of(request))


class Door(Server):
    """A server that says whose key it was asked with."""

    def __init__(self, folder, name, url, **options):
        super().__init__(folder, name, url, **options)
        self.keys = self.service.keys
        routes = [Route("/v1/models", _who), Route("/health", _who)]
        front = AuthMiddleware(Starlette(routes=routes), self.keys, ["/health"])
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://server")

    async def ask(self, key, path="/v1/models"):
        """The tenant, or the status and the code of a refusal."""
        found = await self.client.get(path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
        return found.text if found.status_code == 200 else (found.status_code, found.json()["error"]["code"])


UNKNOWN, AWAY = (401, "invalid_api_key"), (503, "catalog_busy")


def run(scenario, folder, url, listens=False):
    async def whole():
        pair = [Door(folder, name, url, listens=listens) for name in ("one", "two")]
        try:
            await scenario(*pair)
        finally:
            for server in pair:
                await asyncio.to_thread(server.service.close)

    asyncio.run(whole())


@contextlib.asynccontextmanager
async def attending(*pair):
    """They do what servers do all the time."""
    for server in pair:
        await server.membership.attend()
    tasks = [asyncio.create_task(server.membership.run()) for server in pair]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def revoke(server, key):
    """Run the command; returns its exit code and what it said."""
    words = ["keys", "revoke", key, "--database-url", server.url]
    found = await asyncio.to_thread(CliRunner().invoke, app, words)
    return found.exit_code, found.output


@pytest.mark.parametrize("listens", [True, False])
def test_a_key_is_refused_everywhere_when_its_revocation_has_returned(tmp_path, database_url, listens):
    async def scenario(one, two):
        gone, kept = (one.catalog.add_key(tenant) for tenant in ("news", "sport"))
        async with attending(one, two):
            for server in (one, two):
                assert (await server.ask(gone), await server.ask(kept)) == ("news", "sport")
            code, told = await revoke(one, gone)
            refused = [await server.ask(gone) for server in (one, two)]
            assert (code, refused) == (0, [UNKNOWN, UNKNOWN]), told
            for server in (one, two):
                assert await server.ask(kept) == "sport"
                assert await server.ask(gone) == UNKNOWN

    run(scenario, tmp_path, database_url, listens)


def test_a_revocation_says_which_server_has_not_heard_of_it(tmp_path, database_url, monkeypatch):
    monkeypatch.setattr(command, "_WAIT_SECONDS", 1.0)

    async def scenario(one, two):
        key = one.catalog.add_key("news")
        await two.membership.attend()
        async with attending(one):
            code, told = await revoke(one, key)
            assert code == 1
            assert str(two.home) in told
            assert str(one.home) not in told
            assert (await one.ask(key), await two.ask(key)) == (UNKNOWN, "news")
            await two.membership.attend()
            assert await two.ask(key) == UNKNOWN

    run(scenario, tmp_path, database_url)


def test_a_server_that_was_away_compares_its_keys_before_any_is_valid(tmp_path, database_url):
    async def scenario(one, two):
        gone, kept = (one.catalog.add_key(tenant) for tenant in ("news", "sport"))
        async with attending(one):
            await two.membership.attend()
            assert await two.ask(gone) == "news"
            two.be_silent()
            code, _ = await revoke(one, gone)  # does not wait for it
            assert code == 0
            two.keys.hear(time.monotonic() - SERVER_SECONDS)
            for key in (gone, kept):
                assert await two.ask(key) == AWAY
            assert await two.ask(None) == UNKNOWN
            assert await two.ask(gone, "/health") == "default"
            with one.catalog._write() as connection:  # as if the revocation were too old to be told
                connection.exec_driver_sql("DELETE FROM tombstones")
            two.forgetting._said_at = 0.0
            await two.membership.attend()
            assert (await two.ask(gone), await two.ask(kept)) == (UNKNOWN, "sport")

    run(scenario, tmp_path, database_url)


def test_a_server_is_not_ready_before_it_knows_the_keys(tmp_path, database_url):
    async def scenario(one, two):
        key = one.catalog.add_key("news")
        read = one.catalog.api_keys

        def away():
            raise CatalogBusy("away")

        one.catalog.api_keys = away
        with pytest.raises(CatalogBusy):
            await one.membership.attend()
        assert one.membership.why_not_ready is not None
        assert await one.ask(key) == AWAY
        one.catalog.api_keys = read
        await one.membership.attend()
        assert one.membership.why_not_ready is None
        assert await one.ask(key) == "news"

    run(scenario, tmp_path, database_url)


def test_a_new_key_works_within_about_a_second_while_others_are_guessed(tmp_path, database_url):
    async def scenario(one, two):
        async with attending(one, two):
            key = one.catalog.add_key("news")
            started, readings, guesses = time.monotonic(), [], 0
            read = two.catalog.api_keys
            two.catalog.api_keys = lambda: (readings.append(1), read())[1]
            while await two.ask(key) == UNKNOWN:
                assert await two.ask(f"sk-f2l-{guesses}") == UNKNOWN
                assert time.monotonic() - started < 10.0
                guesses += 1
                await asyncio.sleep(0.01)
            assert len(readings) == 1
            assert guesses > 0
            for guess in range(20):
                assert await two.ask(f"sk-f2l-{guess}") == UNKNOWN
            assert len(readings) <= 1 + (time.monotonic() - started) / 1.0

    run(scenario, tmp_path, database_url)


def test_a_server_says_how_far_it_has_come_while_it_forgets_much(tmp_path, database_url, monkeypatch):
    monkeypatch.setattr(forgetting, "_AT_ONCE", 2)

    async def scenario(one, two):
        await one.membership.attend()
        numbers = [one.catalog.revoke_key(key_hash(one.catalog.add_key("news"))) for _ in range(6)]
        said, beat = [], one.catalog.beat_server
        one.catalog.beat_server = lambda server, applied, heard: (said.append(heard), beat(server, applied, heard))[1]
        await one.forgetting.forget()
        assert said == numbers[1::2]

    run(scenario, tmp_path, database_url)


def test_a_request_with_a_known_key_asks_no_database(tmp_path, database_url):
    async def scenario(one, two):
        key = one.catalog.add_key("news")
        await one.membership.attend()
        statements = []
        event.listen(one.catalog._engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
        for _ in range(5):
            assert await one.ask(key) == "news"
        assert await one.ask(None) == UNKNOWN
        assert statements == []
        one.catalog.api_keys()
        assert statements != []

    run(scenario, tmp_path, database_url)


def test_keys_that_were_read_before_a_revocation_do_not_come_back_after_it(tmp_path, database_url):
    async def scenario(one, two):
        key = one.catalog.add_key("news")
        await one.membership.attend()
        has_read, go_on = threading.Event(), threading.Event()
        read = one.catalog.api_keys

        def slow():
            found = read()
            has_read.set()
            go_on.wait()
            return found

        one.catalog.api_keys = slow
        reading = asyncio.create_task(one.keys.read())
        await asyncio.to_thread(has_read.wait)
        one.catalog.revoke_key(key_hash(key))
        forgetting = asyncio.create_task(one.forgetting.forget())
        await asyncio.sleep(0.3)
        go_on.set()
        await asyncio.gather(reading, forgetting)
        one.catalog.api_keys = read
        assert one.keys.tenant(f"Bearer {key}") is None

    run(scenario, tmp_path, database_url)


def test_a_catalog_that_is_away_stops_no_known_key(tmp_path, database_url):
    async def scenario(one, two):
        key = one.catalog.add_key("news")
        await one.membership.attend()
        one.keys._rest_until = 0.0  # it has read a moment ago

        def away():
            raise CatalogBusy("away")

        attempts, one.catalog.api_keys = [], lambda: (attempts.append(1), away())
        for _ in range(5):
            assert await one.ask("sk-f2l-new") == AWAY
            assert await one.ask(key) == "news"
        assert len(attempts) == 1

    run(scenario, tmp_path, database_url)
