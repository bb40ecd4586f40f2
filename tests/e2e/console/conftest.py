"""One server over the shipped model, and one browser."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from f2l_vllm import torch_shims
from f2l_vllm.cluster.membership import Membership
from f2l_vllm.cluster.relay import Engine, Relay
from tests.e2e.console.surfing import Visit, chromium
from tests.support.server import Server
from tests.support.serving import serving

torch_shims.install()

from f2l_vllm.synthetic.render import write_mp4  # noqa: E402
from f2l_vllm.synthetic.world import sample_scenes  # noqa: E402

expect.set_options(timeout=30_000)  # machines that run tests are busy
_ENV = {"F2L_ALLOWED_MEDIA_DOMAINS": "127.0.0.1"}  # links may lead to tests
KEY, OTHER_KEY = "key-of-the-console", "key-of-another-tenant"


class Restartable:
    """A server that can go and come back at the same address, with its data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tenants = folder / "tenants.json"
        tenants.write_text(json.dumps({"default": [KEY], "other": [OTHER_KEY]}))
        self._flags = ("--tenants", str(tenants), "--chunk-seconds", "4", "--max-chunks", "3")
        self.start(None)

    def start(self, port: int | None) -> None:
        """Start it, at a free port if none is given."""
        self.server = Server("f2l-tiny", self._folder / "home", *self._flags, api_key=KEY, port=port, env=_ENV)
        try:
            self.server.wait_ready()
        except BaseException:
            self.server.stop()
            raise
        self.url, self.client = self.server.url, self.server.client


@pytest.fixture(scope="package")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restartable]:
    """The server; videos are cut into chunks of 4 s, so that spans can be asked about."""
    found = Restartable(tmp_path_factory.mktemp("console"))
    yield found
    found.server.stop()


@pytest.fixture(scope="package")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A video of two chunks, and two of one."""
    folder = tmp_path_factory.mktemp("films")
    scenes = sample_scenes(3, seed=11, split="held-out")
    lengths = [8.0, 3.0, 3.0]
    return [
        write_mp4(scene, folder / f"film-{place}.mp4", seconds=seconds)
        for place, (scene, seconds) in enumerate(zip(scenes, lengths, strict=True))
    ]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    with sync_playwright() as playwright:
        browser = chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def front(host: Restartable) -> Iterator[str]:
    """The address of a front that relays to the server, as Ray Serve runs it."""
    engines = Membership()
    engines.update({"engine": host.url})

    async def choose(key: str, tried: Collection[str]) -> Engine:
        return Engine("engine", host.url)

    with serving(Relay(choose, engines).app()) as url:
        yield url


@pytest.fixture
def visit(browser: Browser, host: Restartable) -> Iterator[Visit]:
    """A fresh tab that has the key; nothing may go wrong in it that a test does not expect."""
    found = Visit(browser, host.url, KEY)
    yield found
    found.close()
    assert found.faults == []


@pytest.fixture
def page(visit: Visit) -> Page:
    """The tab's page, open."""
    visit.page.goto(f"{visit.url}/console")
    return visit.page


@pytest.fixture(scope="package")
def film(host: Restartable, films: list[Path]) -> str:
    """The id of a ready video of two chunks."""
    return host.server.upload(films[0]).id
