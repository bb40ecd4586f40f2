"""From a video to answers, in a browser."""

import json
import os
import subprocess
import sys

import pytest
from playwright.sync_api import expect

from tests.e2e.console.conftest import KEY
from tests.e2e.console.surfing import Visit

QUESTION = "Describe the video."


def ask(page, text=QUESTION):
    expect(page.locator(".timeline").first).to_be_visible()
    page.get_by_label("Question", exact=True).fill(text)
    page.keyboard.press("Enter")
    done = page.locator(".question").first.locator("[data-state=done]")
    expect(done).to_have_count(2)
    return [side.inner_text() for side in done.all()]


def sent(page):
    """The bodies of all questions asked from here on."""
    bodies = []
    page.on("request", lambda one: bodies.append(one.post_data_json) if one.url.endswith("/completions") else None)
    return bodies


@pytest.mark.parametrize("through", ["server", "front"])
def test_from_an_upload_to_both_answers_in_four_clicks(host, front, browser, films, tmp_path, through):
    visit = Visit(browser, host.url if through == "server" else front, KEY)
    page = visit.page
    page.goto(f"{visit.url}/console")
    film = tmp_path / "match.mp4"
    film.write_bytes(films[0].read_bytes() + through.encode())  # bytes that no other test uploads
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add videos").click()
    chooser.value.set_files(film)
    page.get_by_role("link", name="Ask about match.mp4").click()
    adapter, frames = ask(page)
    assert page.evaluate("window.clicks") <= 4
    file = next(one for one in host.client.files.list() if one.filename == "match.mp4")
    for mode, shown in (("adapter", adapter), ("frames", frames)):
        answer = host.client.chat.completions.create(
            model=file.id,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=256,
            extra_body={"f2l": {"mode": mode}},
        )
        assert shown == answer.choices[0].message.content.strip()
        cells = page.locator(f".costs td.is-{mode}")
        assert cells.nth(1).inner_text() == str(answer.usage.prompt_tokens)
    assert page.locator(".costs td.is-adapter").nth(2).inner_text() == "0"
    assert f"{file.f2l['visual_tokens']} visual tokens" in page.locator(".costs tfoot").inner_text()
    assert page.locator(".costs td.is-frames").nth(3).inner_text().endswith("KV cache")
    host.client.files.delete(file.id)
    visit.close()
    assert visit.faults == []


def test_several_videos_in_one_question(host, page, films):
    ids = [host.server.upload(film).id for film in films[1:]]
    bodies = sent(page)
    for place in (1, 2):
        page.get_by_role("checkbox", name=f"Choose film-{place}.mp4").check()
    page.get_by_role("link", name="Ask about them").click()
    assert all(ask(page))
    named = [part["file"]["file_id"] for part in bodies[0]["messages"][0]["content"] if part["type"] == "file"]
    assert sorted(named) == sorted(ids)


@pytest.mark.parametrize("by", ["keyboard", "mouse"])
def test_a_span_is_chosen_on_the_timeline(visit, film, by):
    page = visit.page
    page.goto(f"{visit.url}/console/#/ask/{film}")
    bodies = sent(page)
    slider = page.get_by_role("slider", name="From")
    if by == "mouse":  # to the middle, which is 4 s, where the second chunk begins
        box = slider.bounding_box()
        page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
        page.mouse.up()
    else:
        slider.focus()
        for _ in range(40):
            page.keyboard.press("ArrowRight")
    expect(page.get_by_text("Asked about 0:04 to 0:08.")).to_be_visible()
    ask(page)
    (part, _) = bodies[0]["messages"][0]["content"]
    assert part["file"] == {
        "file_id": film,
        "f2l": {"start": pytest.approx(4, abs=0.2), "end": pytest.approx(8, abs=0.2)},
    }
    assert bodies[1]["model"] == film  # the frames are those of the whole video


@pytest.mark.parametrize("name", ["curl", "Python"])
def test_a_question_as_code_gives_the_same_answer(visit, film, name):
    page = visit.page
    page.goto(f"{visit.url}/console/#/ask/{film}")
    adapter, _ = ask(page, 'What\'s the "background"?')
    page.get_by_text("As code").click()
    code = page.get_by_label(f"The question for {name}").inner_text()
    assert KEY not in code
    command = ["bash", "-c", code] if name == "curl" else [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, "F2L_KEY": KEY}, capture_output=True, text=True, check=True)
    answer = done.stdout if name == "Python" else json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert answer.strip() == adapter


def test_answers_are_text_whatever_they_hold(visit, film):
    page = visit.page
    hostile = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    chunks = [
        {"choices": [{"delta": {"content": hostile}}]},
        {"choices": [], "usage": {"prompt_tokens": 1}, "f2l": {"visual_tokens": 0}},
    ]
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    page.goto(f"{visit.url}/console/#/ask/{film}")
    assert ask(page, hostile) == [hostile, hostile]
    assert page.locator("h2", has_text="onerror").count() == 1
    assert page.evaluate("window.hacked") is None


def test_an_error_is_a_sentence_with_its_code(visit, film):
    page = visit.page
    page.goto(f"{visit.url}/console/#/ask/{film}")
    error = {"error": {"code": "too_many_videos_in_use", "message": "Ask again in a moment.", "type": "server_error"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, json=error))
    page.get_by_label("Question", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    problem = page.locator(".side.is-adapter .problem")
    expect(problem).to_have_text("Every place in the engine is taken. Ask again in a moment. too_many_videos_in_use")


def test_a_question_asked_before_its_videos_are_known_is_about_all_of_them(host, visit, films):
    ids = [host.server.upload(film).id for film in films[1:]]
    page, held, bodies = visit.page, [], sent(visit.page)
    page.route("**/v1/files?*", lambda route: route.fulfill(json={"data": [], "has_more": False}))
    page.route(f"**/v1/files/{ids[0]}", lambda route: held.append(route))
    page.goto(f"{visit.url}/console/#/ask/{','.join(ids)}")
    expect(page.locator(".timeline")).to_have_count(1)
    page.get_by_label("Question", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    assert not bodies
    for route in held:
        route.continue_()
    expect(page.locator(".question").first.locator("[data-state=done]")).to_have_count(2)
    assert [part["file"]["file_id"] for part in bodies[0]["messages"][0]["content"][:-1]] == ids
