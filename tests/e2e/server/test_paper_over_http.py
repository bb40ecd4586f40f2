"""`f2l-vllm paper` through a real server, on made-up files of all nine sets; the judge always says 3."""

from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.evaluation.paper.sets import SETS
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes
from tests.support.endpoint import Endpoint
from tests.support.paper_files import write_annotations

CLIPS = 8


@pytest.fixture
def judge() -> Iterator[str]:
    def three(messages: list[dict[str, str]]) -> str:
        caption = "coverage_score" in messages[0]["content"]
        assert ("Instruction: " in messages[0]["content"]) == caption
        return '{"coverage_score": 3}' if caption else '{"extracted_answer": "it", "score": 3}'

    endpoint = Endpoint(three)
    yield endpoint.url
    endpoint.close()


def command(*words):
    found = CliRunner().invoke(app, ["paper", *map(str, words)])
    assert found.exit_code == 0, found.output
    return found.output


def test_all_nine_sets_are_prepared_run_and_shown_beside_the_paper(default_server, judge, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    names = [f"v_{number:05d}" for number in range(CLIPS)]
    for name, scene in zip(names, sample_scenes(CLIPS, 3), strict=True):
        write_mp4(scene, videos / f"{name}.mp4", (64, 48), 4, 3)
    folders = []
    for name in SETS:
        annotations = write_annotations(name, tmp_path / "annotations" / name, names)
        folders.append(tmp_path / name)
        command("prepare", name, "--annotations", annotations, "--videos", videos, "--out", folders[-1])
    server = ("--base-url", f"{default_server.url}/v1", "--max-tokens", "4")
    command("run", *folders, *server, "--judge-base-url", judge, "--judge-model", "judge")
    page = tmp_path / "tables.html"
    shown = command("report", *folders, "--size", "2.2b", "--page", page)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")
    ]
    for one in SETS.values():
        of_judge, of_f1 = (row for row in rows if row[0] == one.title)
        assert of_judge[3:5] == ["0.600", "0.600"]  # 3 of 5
        assert of_judge[2] == of_f1[2]
        assert of_f1[10] != "–"
    assert page.read_text().count("<table>") == 2
