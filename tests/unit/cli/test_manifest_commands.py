"""`f2l-vllm manifest …` as a user runs it."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.train.data.manifest import read_manifest
from tests.support.finevideo_files import FineVideo, entry, scene


def run(*flags: object, code: int = 0) -> str:
    """What `f2l-vllm manifest …` says, in one line: its result, or its error."""
    result = CliRunner().invoke(app, ["manifest", *map(str, flags)])
    assert result.exit_code == code, result.output
    return " ".join((result.stdout or result.output).split())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "world"
    told = run("world", folder, "--videos", 3, "--seed", 5, "--split", "held-out", "--questions-per-video", 2)
    assert told.endswith("manifest.jsonl: 3 videos, 3 filmed now, 0 were there")
    return folder


def test_a_world_is_filmed_once(world):
    assert len(read_manifest(world / "manifest.jsonl", "held-out")) == 6
    told = run("world", world, "--videos", 3, "--seed", 5, "--split", "held-out", "--questions-per-video", 2)
    assert told.endswith("3 videos, 0 filmed now, 3 were there")


def test_an_unknown_split_is_refused(tmp_path):
    told = run("world", tmp_path, "--videos", 1, "--split", "validation", code=2)
    assert "unknown split 'validation'" in told


def test_check_reports_bad_videos_and_writes_a_clean_manifest(world, tmp_path):
    manifest = world / "manifest.jsonl"
    assert run("check", manifest) == "6 of 6 examples can be used"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["video_path"] = "videos/gone.mp4"
    bad = world / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, clean = tmp_path / "report.jsonl", tmp_path / "clean.jsonl"
    told = run("check", bad, "--report", report, code=1)
    assert "left out: 1 x file_not_found" in told
    assert told.endswith("5 of 6 examples can be used")
    (row,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert row["video"] == str(world / "videos" / "gone.mp4")
    assert row["ids"] == [rows[0]["id"]]
    run("check", bad, "--clean", clean)
    assert read_manifest(clean) == read_manifest(manifest)[1:]


def test_a_malformed_manifest_is_told_by_line_and_field(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"id": 1}\n')
    told = run("check", tmp_path / "m.jsonl", code=2)
    assert "line 1: field id: 1 is not a string" in told.replace("│ ", "").replace(" │", "")


def test_finevideos_metadata_become_a_manifest(tmp_path):
    data = FineVideo(tmp_path)
    for number in range(5):
        scenes = [scene(i, a, b) for i, (a, b) in enumerate(pairwise(range(0, 61, 10)))]
        data.add(entry(f"video-{number}", scenes))
    data.add("no JSON")
    output, report = tmp_path / "out" / "manifest.jsonl", tmp_path / "report.jsonl"
    flags = ("finevideo", data.metadata, data.videos, "-o", output, "--seed", 1, "--limit", 20, "--report", report)
    told = run(*flags)
    assert "spans: 12 scene, 6 adjacent, 2 whole" in told
    assert told.endswith("manifest.jsonl: 20 examples")
    first = output.read_bytes()
    assert "is there already: --overwrite replaces it" in run(*flags, code=2)
    run(*flags, "--overwrite")
    assert output.read_bytes() == first
    (row,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert row["reason"].startswith("bad_metadata")
    assert run("check", output) == "20 of 20 examples can be used"
