"""`python -m tests.e2e.console.accessibility`: what axe says of all pages in both themes (benchmarks/results/axe.json).

The tests look at the same pages, and fail at the first violation.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect, sync_playwright

from f2l_vllm.bench import record
from tests.e2e.console.streaming import push, segments
from tests.e2e.console.surfing import Visit, chromium
from tests.support import ROOT
from tests.support.server import Server
from tests.support.videos import write_video

TARGET = ROOT / "benchmarks" / "results" / "axe.json"
THEMES = ("light", "dark")
_AXE = (Path(__file__).parent / "axe" / "axe.js").read_text()
_KEY = "key-of-the-report"
_RULES = ("violations", "incomplete", "passes", "inapplicable")


def findings(browser: Browser, url: str, key: str, film: str, theme: str) -> list[dict[str, Any]]:
    """What axe finds on each page: its version, and by rule what failed, what a person has to judge, and what passed.

    Args:
        film: the id of a ready video.
    """
    visit = Visit(browser, url, key, theme)
    page = visit.page
    found: list[dict[str, Any]] = []

    def check(what: str) -> None:
        page.wait_for_timeout(300)
        said = page.evaluate("() => axe.run()")
        rules = {kind: {one["id"]: [node["html"] for node in one["nodes"]] for one in said[kind]} for kind in _RULES}
        found.append({"page": what, "theme": theme, "axe": said["testEngine"]["version"], **rules})

    page.goto(f"{url}/console")
    page.evaluate(_AXE)
    expect(page.locator(".strip img").first).to_be_visible()
    check("videos")
    page.locator("input[type=file]").set_input_files({"name": "b.mp4", "mimeType": "video/mp4", "buffer": b"no video"})
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_role("checkbox").first.check()
    check("an upload that failed, and a choice")
    page.get_by_role("button", name="Delete").first.click()
    check("a dialog")
    page.keyboard.press("Escape")
    page.evaluate(f"location.hash = '#/ask/{film}'")
    page.get_by_label("Question", exact=True).fill("What is the background?")
    page.keyboard.press("Enter")
    expect(page.locator("[data-state=done]")).to_have_count(2)
    page.get_by_text("As code").click()
    check("answers")
    page.get_by_role("link", name="Live").click()
    page.get_by_role("button", name="Begin a stream").click()
    expect(page.get_by_text("Copy ffmpeg")).to_be_visible()
    check("a stream before its first segment")
    stream = page.url.rpartition("/")[2]
    page.get_by_label("Ask each new segment").fill("What is the background?")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("[data-watch]")).to_be_visible()
    with tempfile.TemporaryDirectory() as folder:
        push(url, key, stream, segments(Path(folder), 1)[0])
    page.get_by_label("About").select_option("span")
    page.get_by_label("Question", exact=True).fill("What is the background?")
    page.keyboard.press("Enter")
    expect(page.locator("[data-state=done]")).to_have_count(1)
    expect(page.locator("[data-watch] ol li")).to_have_count(1)
    check("a stream with answers")
    page.get_by_role("link", name="Live").click()
    row = page.locator(f"[data-stream='{stream}']")
    expect(row).to_be_visible()
    check("live streams")
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    page.get_by_role("link", name="Server").click()
    expect(page.locator(".plot canvas").first).to_be_visible()
    check("the server")
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("Key")).to_be_visible()
    check("the key")
    visit.close()
    assert visit.faults == []
    return found


def main(target: Path) -> None:
    """Look at all pages of a server over the shipped model, and write what was found."""
    expect.set_options(timeout=120_000)
    with tempfile.TemporaryDirectory() as work, sync_playwright() as playwright:
        server = Server("f2l-tiny", Path(work) / "home", "--api-key", _KEY, api_key=_KEY)
        try:
            server.wait_ready()
            film = server.upload(write_video(Path(work) / "film.mp4")).id
            browser = chromium(playwright)
            found = [one for theme in THEMES for one in findings(browser, server.url, _KEY, film, theme)]
            version = browser.version
            browser.close()
        finally:
            server.stop()
    pages = [one | {kind: sorted(one[kind]) for kind in ("passes", "inapplicable")} for one in found]
    total = sum(len(one["violations"]) for one in found)
    record.write(target, {"browser": f"Chromium {version}"}, {"violations": total, "pages": pages})
    print(f"{len(pages)} pages, {total} violations: {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=TARGET, help="where to write it")
    main(parser.parse_args().json)
