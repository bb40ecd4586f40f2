"""The page shows every answer, plays every video, filters by its address, and runs nothing that an answer says.

Where a chromium is installed the page is read as it stands there after its script ran, else as it is written.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from base64 import b64encode
from dataclasses import replace
from functools import cache
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from f2l_vllm.evaluation.answers import AnswerRecord, read_answers
from f2l_vllm.evaluation.browse import write_page
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
HOSTILE = "</script></td><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def answer(video: str, kind: str, arm: str, text: str, truth: str, f1: float = 0.0) -> AnswerRecord:
    return AnswerRecord(
        id=f"{video}/{kind}",
        video=video,
        source=video,
        question=f"What {kind}?",
        type=kind,
        dataset="test",
        truth=truth,
        arm=arm,
        answer=text,
        exact_match=text == truth,
        f1=1.0 if text == truth else f1,
        judge=None,
        prompt_tokens=10 if arm == "adapter" else 102,
        visual_tokens=0,
        ttft_ms=20.0,
        seconds=0.1,
    )


ANSWERS = [
    answer("videos/a.mp4", "action", "adapter", "It moves left.", "It moves right.", f1=2 / 3),
    answer("videos/a.mp4", "action", "frames", "It moves right.", "It moves right."),
    answer("videos/a.mp4", "colour", "adapter", "Red.", "Red."),
    answer("videos/a.mp4", "colour", "frames", "Blue.", "Red."),
    answer("videos/b #1.mp4", "colour", "adapter", HOSTILE, "Green & <b>bold</b>."),
    answer("videos/b #1.mp4", "colour", "frames", "", "Green & <b>bold</b>."),
]


class Page(HTMLParser):
    """What a test looks for: the elements with their attributes, and the text of every cell of a table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[tuple[dict[str, str | None], list[str]]] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts[-1] += data
        elif {"td", "th"} & set(self._inside):
            self.rows[-1][1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def questions(self) -> list[list[str]]:
        """The cells' texts of the questions that are shown."""
        shown = [cells for attrs, cells in self.rows if attrs.get("class") == "question" and "hidden" not in attrs]
        return [[" ".join(cell.split()) for cell in cells] for cells in shown]


@cache
def read(path: Path, filters: str = "") -> Page:
    """The page as it is written, or as a browser shows it under the filters of its address."""
    if CHROMIUM is None:
        return Page(path.read_text(encoding="utf-8"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"{path.as_uri()}#{filters}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Page(shown.stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "videos").mkdir()
    for scene, name in zip(sample_scenes(2, 0), ("a", "b #1"), strict=True):
        write_mp4(scene, folder / "videos" / f"{name}.mp4", size=(160, 120), seconds=1)
    return folder


@pytest.fixture(scope="module")
def page(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(
        ANSWERS[::-1], work, tmp_path_factory.mktemp("page") / "out", metric="exact_match", title="Test <page>"
    )


def test_every_question_has_its_truth_and_the_answers_of_all_arms_side_by_side(page: Path) -> None:
    action, colour, hostile = read(page).questions
    assert [cell.split(" ✓")[0].split(" ✗")[0] for cell in colour] == [
        "What colour? colour",
        "Red.",
        "Red.",
        "Blue.",
    ]
    assert "✓ right" in colour[2]
    assert "10 tokens, 20 ms" in colour[2]
    assert "✗ wrong" in colour[3]
    assert "✗ wrong, F1 0.67" in action[2]
    assert "<b>bold</b>" in hostile[1]
    assert hostile[2].startswith(HOSTILE)
    assert "(no words)" in hostile[3]


def test_every_video_is_beside_the_page_and_is_the_one_that_was_watched(page: Path, work: Path) -> None:
    sources = [attrs["src"] for attrs in read(page).all("video")]
    assert len(sources) == 2
    for source, name in zip(sources, ("a.mp4", "b #1.mp4"), strict=True):
        assert source is not None
        assert re.fullmatch(r"[\w./-]+", source)
        assert (page.parent / source).read_bytes() == (work / "videos" / name).read_bytes()


def test_the_folder_holds_its_answers_with_the_videos_it_plays(page: Path) -> None:
    kept = read_answers(page.parent / "answers.jsonl")
    assert [replace(one, video="", source="") for one in kept] == [replace(a, video="", source="") for a in ANSWERS]
    assert {one.video for one in kept} == {attrs["src"] for attrs in read(page).all("video")}
    assert all(one.source == one.video for one in kept)


def test_files_that_spans_were_cut_from_are_told_apart_and_not_named(work: Path, tmp_path: Path) -> None:
    spans = [replace(one, source="/home/someone/match.mp4") for one in ANSWERS]
    page = write_page(spans, work, tmp_path / "page", metric="exact_match", title="Spans")
    kept = read_answers(page.parent / "answers.jsonl")
    assert len({one.video for one in kept}) == 2
    assert {one.source for one in kept} == {"source-0000"}


def test_nothing_an_answer_says_runs_and_nothing_is_fetched_from_elsewhere(page: Path) -> None:
    shown = read(page)
    assert len(shown.scripts) == 1
    (policy,) = (a["content"] for a in shown.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    digest = b64encode(sha256(shown.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not shown.all("img")
    for _, attrs in shown.elements:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href"):
            assert not re.match(r"(?i)\w+:|//", attrs.get(name) or "")
    assert "owned" not in re.findall(r"<title>(.*?)</title>", page.read_text(encoding="utf-8"))[0]


def test_filters_stand_in_the_address_and_every_one_has_a_control_with_a_label(page: Path) -> None:
    written = read(page)
    assert {attrs["value"] for attrs in written.all("option")} == {"", "colour", "action"}
    boxes = [attrs["value"] for attrs in written.all("input") if attrs.get("type") == "checkbox"]
    assert boxes == ["adapter", "frames"]
    if CHROMIUM is None:  # what the script goes by
        cells = [attrs for attrs in written.all("td") if "data-verdict" in attrs]
        assert [(cell["data-arm"], cell["data-verdict"]) for cell in cells] == [
            (one.arm, "right" if one.exact_match else "wrong") for one in ANSWERS
        ]
        assert [attrs["data-type"] for attrs in written.all("tr") if "data-type" in attrs] == [
            "action",
            "colour",
            "colour",
        ]
        return
    assert [cells[0] for cells in read(page, "type=colour").questions] == ["What colour? colour"] * 2
    assert [cells[0] for cells in read(page, "type=action&wrong=adapter").questions] == ["What action? action"]
    green = read(page, "text=GREEN+%26&wrong=adapter&wrong=frames").questions
    assert [cells[1] for cells in green] == ["Green & <b>bold</b>."]
    nothing = read(page, "wrong=adapter&wrong=frames&type=action")
    assert nothing.questions == []
    assert ["hidden" in attrs for attrs in nothing.all("section")] == [True, True]


def test_free_form_answers_are_right_from_half_of_the_words(work: Path, tmp_path: Path) -> None:
    page = write_page(ANSWERS[:4], work, tmp_path / "page", metric="f1", title="Test")
    assert "✓ right, F1 0.67" in Page(page.read_text(encoding="utf-8")).questions[0][2]


def test_an_arm_that_was_not_asked_says_so(work: Path, tmp_path: Path) -> None:
    page = write_page(ANSWERS[1:4], work, tmp_path / "page", metric="exact_match", title="Test")
    assert "not asked" in Page(page.read_text(encoding="utf-8")).questions[0][2]


def test_a_missing_video_no_answers_and_a_folder_in_use_are_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    lost = [replace(ANSWERS[0], video="videos/lost.mp4")]
    for answers, output, error, words in (
        (lost, tmp_path / "page", ValueError, "lost.mp4"),
        ([], tmp_path / "page", ValueError, "run the evaluation"),
        (ANSWERS, tmp_path, FileExistsError, "not empty"),
    ):
        with pytest.raises(error, match=words):
            write_page(answers, work, output, metric="exact_match", title="Test")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
