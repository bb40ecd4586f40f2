"""Live streams in a browser: begun, fed, watched, asked, ended."""

import re

import pytest
from playwright.sync_api import expect

from tests.e2e.console.conftest import KEY
from tests.e2e.console.streaming import SECONDS, push, segments


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Three segments."""
    return segments(tmp_path_factory.mktemp("segments"), 3)


@pytest.fixture
def stream(visit):
    """The id of a stream that was begun on the page, which shows it."""
    page = visit.page
    page.goto(f"{visit.url}/console/#/live")
    page.get_by_label("Name").fill("front <b>door</b>")
    page.get_by_label("Segment in seconds").fill(str(SECONDS))
    page.get_by_role("button", name="Begin a stream").click()
    expect(page.get_by_role("heading", name="front <b>door</b>")).to_be_visible()
    return page.url.rpartition("/")[2]


def ask(page, text="What is the background?"):
    page.get_by_label("Question", exact=True).fill(text)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    newest = page.locator(".question").first
    expect(newest.locator("[data-state=done]")).to_be_visible()
    return asked.value.post_data_json, newest


def test_a_stream_fills_its_timeline_and_answers_about_a_stretch(host, visit, stream, film):
    page = visit.page
    command = page.get_by_role("group", name="The command for ffmpeg")
    expect(command).to_contain_text(f"-method PUT '{host.url}/v1/streams/{stream}/push/live.m3u8'")
    assert KEY not in command.inner_text()
    for segment in film:
        push(host.url, KEY, stream, segment)
    fine = page.locator(".lanes .is-fine i")
    expect(fine).to_have_count(3)
    expect(page.locator(".lanes .is-fine .is-ready")).to_have_count(3)
    expect(page.get_by_alt_text("A frame of the newest segment")).to_be_visible()
    body, answer = ask(page)
    assert (body["model"], "f2l" in body) == (stream, False)
    expect(answer).to_contain_text("Read from 0:00 to 0:06.")
    expect(page.locator(".lanes .is-covered")).to_have_count(1)
    track = page.locator(".stretch .track").bounding_box()
    middle = track["y"] + track["height"] / 2
    page.mouse.move(track["x"] + 2, middle)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * 0.34, middle, steps=4)
    page.mouse.up()
    expect(page.get_by_label("About")).to_have_value("span")
    body, answer = ask(page)
    assert body["f2l"]["start"] < 0.1
    assert 1.9 < body["f2l"]["end"] < 2.2
    expect(answer).to_contain_text("Read from 0:00 to 0:02.")
    whole, part = fine.nth(0).bounding_box(), page.locator(".lanes .is-covered").bounding_box()
    assert abs(whole["width"] - part["width"]) < 3
    assert abs(whole["x"] - part["x"]) < 3


def test_a_stretch_is_chosen_by_keyboard_too(host, visit, stream, film):
    page = visit.page
    push(host.url, KEY, stream, film[0])
    page.get_by_label("About").select_option("last")
    page.get_by_label("Seconds", exact=True).fill("5")
    assert ask(page)[0]["f2l"] == {"last": 5}
    page.get_by_label("About").select_option("span")
    page.get_by_label("To, the stretch").press("ArrowLeft")
    body, _ = ask(page)
    assert body["f2l"]["start"] == 0
    assert body["f2l"]["end"] < SECONDS


def test_standing_questions_are_answered_for_each_segment(host, visit, stream, film):
    page = visit.page
    page.get_by_label("Ask each new segment").fill("What is the <i>background</i>?")
    page.get_by_role("button", name="Add", exact=True).click()
    watch = page.locator("[data-watch]")
    expect(watch).to_contain_text("What is the <i>background</i>?")
    for segment in film[:2]:
        push(host.url, KEY, stream, segment)
    answers = watch.locator("ol li")
    expect(answers).to_have_count(2)
    expect(answers.first).to_have_text(re.compile(r"^0:02 to 0:04 \w+"))
    expect(answers.last).to_have_text(re.compile(r"^0:00 to 0:02 \w+"))
    page.reload()
    expect(answers).to_have_count(2)
    watch.get_by_role("button", name="Remove").click()
    expect(watch).to_have_count(0)


def test_a_stream_is_ended_and_deleted_after_a_question(host, visit, stream):
    page = visit.page
    page.get_by_role("link", name="Live").click()
    mine = page.locator(f"[data-stream='{stream}']")
    expect(mine).to_contain_text("live")
    mine.get_by_role("button", name="End").click()
    page.get_by_role("dialog").get_by_role("button", name="End").click()
    expect(mine).to_contain_text("ended")
    mine.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Cancel").click()
    expect(mine).to_be_visible()
    mine.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(mine).to_have_count(0)
    page.goto(f"{visit.url}/console/#/live/{stream}")
    expect(page.get_by_role("alert")).to_contain_text(re.compile("This stream does not exist"))


def test_a_source_that_may_not_be_fetched_says_what_to_do(visit):
    page = visit.page
    page.goto(f"{visit.url}/console/#/live")
    page.get_by_label("Source").fill("rtsp://192.0.2.9/camera")
    page.get_by_role("button", name="Begin a stream").click()
    told = page.locator(".live header .facts")
    expect(told).to_contain_text("source failed")
    expect(told).to_contain_text("F2L_ALLOWED_MEDIA_DOMAINS")
