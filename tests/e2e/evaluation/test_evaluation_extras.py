"""`f2l-vllm eval` with everything it can measure and draw, in process; and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from f2l_vllm.cli.main import app
from f2l_vllm.evaluation.questions import ARMS
from tests.support.videos import write_video

IN_PROCESS = ("--through", "transformers", "--max-tokens", "16")
SWEEP = ("--sweep", "--sweep-frames", "4", "--sweep-resolutions", "64")


def run(*options: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, options)], catch_exceptions=False)


def test_one_command_measures_draws_and_shows_everything(tmp_path: Path) -> None:
    wanted = (*SWEEP, "--diagnostics", "--plots", tmp_path / "plots", "--browse", tmp_path / "page")
    done = run("--videos", 2, "--seed", 5, *IN_PROCESS, *wanted, "--json", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["arms"]) == set(ARMS)
    assert [row["arm"] for row in result["sweep"]["rows"]] == ["adapter", "frames"]
    assert result["diagnostics"]["questions"] == 20
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {
        *("scores.png", "sweep-heat-maps.png", "sweep-over-frames.png", "rank-ablation.png"),
        *("layer-removal.png", "update-norm.png", "logit-attribution.png"),
    }
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("<video ") == 2
    assert page.count('class="question"') == 22
    for name in (*names, "index.html"):
        assert name in done.output


def test_a_manifests_files_are_swept_as_they_are(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", frames=24, fps=8, size=(160, 120))
    example = {
        "id": "one",
        "video_path": "clip.mp4",
        "prompt": "What is the background?",
        "target_text": "Gray.",
        "task_type": "background",
        "dataset": "own",
        "split": "test",
    }
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps(example) + "\n")
    done = run("--manifest", manifest, "--arms", "adapter,frames", *IN_PROCESS, *SWEEP, "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "r.json").read_text())["sweep"]["rows"]
    assert [(row["frames"], row["resolution"], row["n"], row["ci95"]) for row in rows] == [(4, 64, 1, None)] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sweep", "--base-url", "http://127.0.0.1:1/v1"), "leave out"),
        (("--sweep", "--sweep-frames", "4,many"), "whole numbers"),
        (("--sweep", "--sweep-resolutions", "160,160"), "different"),
        (("--plots", "{file}"), "is a file"),
        (("--browse", "{folder}"), "not empty"),
    ],
)
def test_what_could_not_be_done_is_refused_before_any_work(
    options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    places = {"file": tmp_path / "kept.txt", "folder": tmp_path}
    done = run("--work", tmp_path / "work", *(option.format(**places) for option in options))
    assert done.exit_code == 2
    assert words in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "work").exists()
