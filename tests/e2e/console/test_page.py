"""The page as a whole: keys, keyboards, screen readers, policy, and a server that comes and goes."""

import signal

import httpx
import pytest
from playwright.sync_api import expect

from tests.e2e.console.accessibility import THEMES, findings
from tests.e2e.console.conftest import KEY
from tests.e2e.console.surfing import Visit


@pytest.fixture
def stranger(browser, host):
    """A tab without a key."""
    found = Visit(browser, host.url, None)
    found.page.goto(f"{host.url}/console")
    yield found
    found.close()


def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab(stranger, film):
    page = stranger.page
    for key in ("wrong", "wrong"):
        page.get_by_label("Key").fill(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server does not know this key.")
    page.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".row").first).to_be_visible()
    assert KEY not in page.url
    assert page.evaluate("JSON.stringify(localStorage)").find(KEY) == -1
    assert page.context.cookies() == []
    page.reload()
    expect(page.locator(".row").first).to_be_visible()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("Key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.locator(".row").count() == 0


def test_the_keyboard_alone_suffices(stranger, film, films, tmp_path):
    page, press = stranger.page, stranger.page.keyboard.press
    choosers = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    video = tmp_path / "by-keyboard.mp4"
    video.write_bytes(films[1].read_bytes() + b"\5")

    def tab_to(name):
        for _ in range(60):
            press("Tab")
            focus = page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.innerText")
            if (focus or "").strip().startswith(name):
                return
        raise AssertionError(f"Tab does not reach {name}")

    expect(page.get_by_label("Key")).to_be_focused()
    page.keyboard.type(KEY)
    press("Enter")
    expect(page.locator(".row").first).to_be_visible()
    tab_to("Add videos")
    press("Enter")
    while not choosers:
        page.wait_for_timeout(50)
    choosers[0].set_files(video)
    expect(page.locator(".row", has_text="by-keyboard.mp4").locator(".strip img")).to_be_visible()
    tab_to("by-keyboard.mp4, ready")
    press("ArrowDown")
    press("ArrowUp")
    press("Enter")
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    page.keyboard.type("What is the background?")
    press("Enter")
    expect(page.locator("[data-state=done]")).to_have_count(2)
    tab_to("As code")
    press("Enter")
    tab_to("Copy curl")
    press("Enter")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    for _ in range(40):
        press("Shift+Tab")
        if page.evaluate("document.activeElement.innerText") == "Videos":
            break
    press("Enter")
    tab_to("by-keyboard.mp4, ready")
    expect(page.get_by_text("1 chosen")).to_be_visible()  # it was asked about
    press("Space")
    expect(page.get_by_text("1 chosen")).to_have_count(0)
    press("Delete")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    press("Tab")
    press("Enter")
    expect(page.locator(".row", has_text="by-keyboard.mp4")).to_have_count(0)


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing(browser, host, film, theme):
    found = findings(browser, host.url, KEY, film, theme)
    assert [(one["page"], one["violations"]) for one in found if one["violations"]] == []
    assert all(len(one["passes"]) > 10 for one in found)
    unsure = {rule for one in found for rule in one["incomplete"]}
    assert unsure <= {"color-contrast"}  # axe cannot tell the colour below some texts


def test_the_policy_keeps_scripts_and_hosts_out(visit, host):
    page = visit.page
    page.goto(f"{host.url}/console")
    expect(page.locator(".bar")).to_be_visible()
    blocked = page.evaluate(
        """async () => {
            const script = document.createElement("script");
            script.append("window.hacked = 1");
            document.body.append(script);
            document.body.setAttribute("style", "color: red");
            const write = () => { document.body.innerHTML += "<b>x</b>"; return false; };
            const html = (() => { try { return write(); } catch { return true; } })();
            const host = await fetch("http://127.0.0.1:9/").then(() => false, () => true);
            return [window.hacked === undefined, html, host];
        }"""
    )
    assert blocked == [True, True, True]
    page.wait_for_timeout(500)  # they are told a moment later
    breaches = {fault.removeprefix("CSP ") for fault in visit.faults if fault.startswith("CSP ")}
    assert breaches >= {"require-trusted-types-for", "style-src-attr", "connect-src"}
    visit.faults.clear()


def test_the_servers_page_shows_its_metrics(visit, host, film):
    host.client.chat.completions.create(model=film, messages=[{"role": "user", "content": "Hello?"}], max_tokens=2)
    page = visit.page
    page.goto(f"{host.url}/console/#/server")
    tile = page.locator(".tile", has_text="Adapters in host memory")
    expect(tile).to_contain_text("256 places")
    metrics = httpx.get(f"{host.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    resident = next(line for line in metrics.splitlines() if line.startswith("f2l_adapters_resident"))
    assert tile.locator("b").inner_text() == str(int(float(resident.split()[-1])))
    expect(page.locator(".tile", has_text="Workers").locator("b")).to_have_text("1")
    expect(page.locator(".plot canvas")).to_have_count(4)


def test_a_server_that_goes_and_returns(visit, host, film):
    page = visit.page
    page.goto(f"{host.url}/console")
    mine = page.locator(f"[data-file='{film}']")
    expect(mine).to_be_visible()
    port = int(host.url.rpartition(":")[2])
    host.server.process.send_signal(signal.SIGKILL)
    host.server.process.wait()
    expect(page.get_by_text("The server does not answer.")).to_be_visible()
    expect(mine).to_be_visible()  # what is known stays
    host.start(port)
    expect(page.get_by_text("The server does not answer.")).to_have_count(0)
    expect(mine).to_be_visible()
    mine.get_by_role("link", name="Ask").last.click()
    page.get_by_label("Question", exact=True).fill("What is the background?")
    page.keyboard.press("Enter")
    expect(page.locator("[data-state=done]")).to_have_count(2)
