"""A tab of a browser on the console, which notes what it should not do."""

from __future__ import annotations

import shutil
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Playwright, Request

_NOTE_CLICKS = "window.clicks = 0; addEventListener('click', event => { window.clicks += event.isTrusted }, true)"
_NOTE_BREACHES = "addEventListener('securitypolicyviolation', event => console.error('CSP', event.violatedDirective))"


def chromium(playwright: Playwright) -> Browser:
    """The system's Chromium, without a window."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    return playwright.chromium.launch(executable_path=found, args=["--headless", "--no-sandbox", "--disable-gpu"])


class Visit:
    """A tab with its own storage.

    Args:
        key: kept in the tab as if it had been given before; None: none.
        theme: `light` or `dark`, what the system asks for.

    Attributes:
        faults: what no page may do: errors of scripts, breaches of the policy, requests to other hosts, keys in
            addresses. Refused requests are what some tests are about, and are not among them.
        requests: all addresses that were asked, with their methods.
    """

    def __init__(self, browser: Browser, url: str, key: str | None, theme: str = "light") -> None:
        self.url, self._key = url, key
        self.faults: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self._context = browser.new_context(
            viewport={"width": 1280, "height": 800}, color_scheme=theme, permissions=["clipboard-write"]
        )
        self._context.add_init_script(_NOTE_CLICKS)
        self._context.add_init_script(_NOTE_BREACHES)
        if key is not None:
            self._context.add_init_script(f"sessionStorage.setItem('f2l-key', {key!r})")
        self.page = self._context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", self._note)

    def close(self) -> None:
        """Close the tab and forget what it kept."""
        self._context.close()

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.faults.append(message.text)

    def _note(self, request: Request) -> None:
        parts = urlsplit(request.url)
        self.requests.append((request.method, parts.path))
        if parts.scheme != "blob" and f"{parts.scheme}://{parts.netloc}" != self.url:
            self.faults.append(f"asked another host: {request.url}")
        if self._key is not None and self._key in request.url:
            self.faults.append(f"a key in an address: {request.url}")
