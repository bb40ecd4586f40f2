"""`python -m tests.e2e.console.screenshots`: makes the pictures in docs/console, from a server over the shipped model.

Five pages in two themes, and an animation from an upload to both answers. The machine should have the font Inter
(Debian: fonts-inter); without it pages are set in the system's own.
"""

from __future__ import annotations

import io
import tempfile
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from f2l_vllm import torch_shims
from f2l_vllm.server_process import ServerProcess
from tests.e2e.console.streaming import SECONDS, push, segments
from tests.e2e.console.surfing import Visit, chromium
from tests.support import ROOT

torch_shims.install()

from f2l_vllm.synthetic import phrases  # noqa: E402
from f2l_vllm.synthetic.render import write_mp4  # noqa: E402
from f2l_vllm.synthetic.world import sample_scenes  # noqa: E402

TARGET = ROOT / "docs" / "console"
_QUALITY = 82
_QUESTIONS = ("What is the background?", "How many shapes are there?", "Describe the video.")
_MOST_BYTES = 2 << 20
_ROWS = 13  # at least so many exist in the window
_SEGMENTS = 9
_SMALL = (960, 600)  # pixels of the animation


def films(folder: Path, count: int, seed: int) -> list[Path]:
    """Videos of scenes the model has never seen, each named after what happens in it."""
    made = []
    for scene in sample_scenes(count, seed=seed, split="held-out"):
        name = phrases.caption(scene).split(" on a")[0].rstrip(".").replace(" ", "-").lower()
        made.append(write_mp4(scene, folder / f"{name[:44]}.mp4"))
    return made


def main() -> None:
    """Write all pictures."""
    TARGET.mkdir(exist_ok=True)
    expect.set_options(timeout=120_000)
    with tempfile.TemporaryDirectory() as work, sync_playwright() as playwright:
        server = ServerProcess("f2l-tiny", Path(work) / "home", "--max-chunks", "4")
        try:
            made = films(Path(work), 1 + _ROWS, seed=5)
            server.wait_ready()
            browser = chromium(playwright)
            for theme in ("light", "dark"):
                visit = Visit(browser, server.url, None, theme)
                _pages(visit, theme, made[:-1])
                _live(visit, theme, Path(work))
                assert visit.faults == [], visit.faults
                visit.close()
            _animate(Visit(browser, server.url, None), made[-1])
            browser.close()
        finally:
            server.stop()


def _pages(visit: Visit, theme: str, made: list[Path]) -> None:
    page = visit.page
    page.set_default_timeout(120_000)
    page.goto(f"{visit.url}/console")
    if theme == "light":
        page.locator("input[type=file]").set_input_files(made)
    expect(page.locator(".row .poster img")).to_have_count(_ROWS)
    expect(page.locator(".row .strip img")).to_have_count(_ROWS)
    _save(page, f"videos-{theme}")
    page.locator(".row .name a").nth(1).click()
    for question in _QUESTIONS:
        _ask(page, question)
    _save(page, f"ask-{theme}")
    page.get_by_text("Add a video").click()
    page.get_by_role("checkbox").nth(3).check()
    page.get_by_role("link", name="Ask about them").click()
    expect(page.locator(".film img")).to_have_count(2)
    _ask(page, "Describe the video.")
    _save(page, f"several-{theme}")
    page.get_by_role("link", name="Server").click()
    asking = threading.Thread(target=_load, args=(visit.url,))
    asking.start()
    while asking.is_alive():
        page.wait_for_timeout(1000)
    _save(page, f"server-{theme}")


def _live(visit: Visit, theme: str, folder: Path) -> None:
    page = visit.page
    page.goto(f"{visit.url}/console/#/live")
    page.get_by_label("Name").fill("Front door")
    page.get_by_label("Segment in seconds").fill(str(SECONDS))
    page.get_by_label("Window in seconds").fill(str(3 * SECONDS))
    page.get_by_role("button", name="Begin a stream").click()
    expect(page.get_by_text("How to send it")).to_be_visible()
    stream = page.url.rpartition("/")[2]
    for place, segment in enumerate(segments(folder, _SEGMENTS)):
        push(visit.url, "none", stream, segment)
        expect(page.locator(".lanes .is-fine .is-ready")).to_have_count(place + 1)
        page.wait_for_timeout(1000 * SECONDS)
    _ask(page, "What is the background?", 1)
    page.get_by_label("About").select_option("last")
    page.get_by_label("Seconds", exact=True).fill(str(4 * SECONDS))
    _ask(page, "Describe the video.", 1)
    _save(page, f"live-{theme}")


def _load(url: str) -> None:
    """Questions for a while, so that there is something to plot."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    ids = [file.id for file in client.files.list()]
    for place in range(150):
        client.chat.completions.create(
            model=ids[place % len(ids)],
            messages=[{"role": "user", "content": _QUESTIONS[place % 3]}],
            max_tokens=24,
            extra_body={"f2l": {"mode": "frames"}} if place % 4 == 0 else None,
        )


def _ask(page: Page, question: str, answers: int = 2) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.locator(".question").first.locator("[data-state=done]")).to_have_count(answers)
    page.wait_for_timeout(300)


def _save(page: Page, name: str) -> None:
    Image.open(io.BytesIO(page.screenshot())).save(TARGET / f"{name}.webp", quality=_QUALITY, method=6)


def _animate(visit: Visit, film: Path) -> None:
    """Eight seconds; how long each picture stays is told here, as a browser that is filmed is not to be timed."""
    page = visit.page
    page.set_default_timeout(120_000)
    shots: list[tuple[Image.Image, int]] = []

    def shoot(milliseconds: int) -> None:
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        shots.append((picture.resize(_SMALL, Image.Resampling.LANCZOS), milliseconds))

    page.goto(f"{visit.url}/console")
    expect(page.locator(".row .strip img")).to_have_count(_ROWS)
    shoot(900)
    page.locator("input[type=file]").set_input_files(film)
    for _ in range(5):
        shoot(160)
    mine = page.locator(".row", has_text=film.name)
    expect(mine.locator(".strip img")).to_be_visible()
    shoot(900)
    mine.locator(".name a").click()
    expect(page.locator(".film img")).to_be_visible()
    shoot(700)
    field = page.get_by_label("Question", exact=True)
    for end in range(4, len(_QUESTIONS[2]) + 4, 4):
        field.fill(_QUESTIONS[2][:end])
        shoot(140)
    page.keyboard.press("Enter")
    for _ in range(6):
        shoot(120)
    expect(page.locator("[data-state=done]")).to_have_count(2)
    page.locator("main").evaluate("main => main.scrollTo(0, 1e9)")
    shoot(3000)
    visit.close()
    pictures, times = zip(*shots, strict=True)
    target = TARGET / "upload-to-answers.webp"
    options = {"duration": list(times), "loop": 0, "quality": 70, "method": 6}
    pictures[0].save(target, save_all=True, append_images=pictures[1:], **options)
    assert target.stat().st_size <= _MOST_BYTES


if __name__ == "__main__":
    main()
