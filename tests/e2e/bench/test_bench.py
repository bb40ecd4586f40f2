"""`f2l-vllm bench` as a user runs it: real servers are started, asked and stopped, and a result is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm import vllm_versions
from f2l_vllm.bench import planner, report
from f2l_vllm.cli.main import app

ARMS = ("adapter", "adapter-cold", "frames", "frames-cached")


def test_latency_over_frames_through_real_servers(tmp_path: Path) -> None:
    target, plots, tables = tmp_path / "result.json", tmp_path / "plots", tmp_path / "result.md"
    asked = ["latency", "--shape", "tiny", "--frames", "4,8,1024", "--resolution", "224", "--rounds", "1"]
    wanted = ["--json", str(target), "--plots", str(plots), "--markdown", str(tables)]
    ran = CliRunner().invoke(app, ["bench", *asked, *wanted])
    assert ran.exit_code == 0, ran.output
    result = json.loads(target.read_text())

    assert (result["suite"], result["configuration"]["model"]) == ("latency", "tiny")
    assert result["versions"]["vllm"].startswith(vllm_versions.installed())
    assert result["machine"]["cores"] >= 1
    rows = {(row["arm"], row["frames"]): row for row in result["rows"]}
    assert list(rows) == [(arm, frames) for frames in (4, 8, 1024) for arm in ARMS]
    for frames in (4, 8):
        for arm in ARMS:
            row = rows[arm, frames]
            assert not row["counted"]
            assert row["ttft_ms"]["median"] > 0
            assert len(row["ttft_ms"]["all"]) == 1
        adapter, in_context = rows["adapter", frames], rows["frames", frames]
        assert adapter["prompt_tokens"] == rows["adapter-cold", frames]["prompt_tokens"]
        assert in_context["prompt_tokens"] == rows["frames-cached", frames]["prompt_tokens"]
        assert (adapter["visual_tokens"], in_context["visual_tokens"]) == (0, 4 * frames)
        assert in_context["prompt_tokens"] > adapter["prompt_tokens"] + 4 * frames
        assert in_context["state_bytes"] == 4 * frames * 2048  # fp32 keys and values of 4 layers

    # What is counted goes on from what was measured: the same adapter, and tokens in proportion.
    assert rows["adapter", 1024]["ttft_ms"] is None
    for name in ("prompt_tokens", "state_bytes"):
        assert rows["adapter", 1024][name] == rows["adapter", 8][name]
    per_frame = (rows["frames", 8]["prompt_tokens"] - rows["frames", 4]["prompt_tokens"]) / 4
    assert rows["frames", 1024]["prompt_tokens"] == pytest.approx(1024 * per_frame, rel=0.05)

    ratios = {(ratio["arm"], ratio["frames"]): ratio for ratio in result["ratios"]}
    assert ratios["frames", 8]["ttft"] == pytest.approx(
        rows["frames", 8]["ttft_ms"]["median"] / rows["adapter", 8]["ttft_ms"]["median"], abs=0.01
    )
    assert ratios["frames", 1024]["prompt_tokens"] > 300
    assert sorted(path.name for path in plots.iterdir()) == [
        "first-token.png",
        "latency-heat-maps.png",
        "latency.png",
    ]
    assert tables.read_text() == report.markdown(result)
    assert planner.plan(planner.Measured([target]), planner.Need(8, 4, 2, 1e9))["best"] in ("adapter", "kv", "frames")

    # All is there: nothing is measured again, and so no server is started.
    again = CliRunner().invoke(app, ["bench", *asked, "--json", str(target), "--resume"])
    assert again.exit_code == 0, again.output
    assert "first token after" not in again.output
    assert json.loads(target.read_text())["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["latency", "--set", "fames=8"], "has no key 'fames'"),
        (["speed"], "no suite 'speed'"),
        (["capacity", "--shape", "7b"], "no shape '7b'"),
        (["capacity", "--shape", "tiny", "--model", "f2l-tiny"], "give --shape or --model"),
        (["capacity", "--model", "nowhere"], "no model at 'nowhere'"),
        (["capacity", "--hypernetwork", "x"], "give --hypernetwork with --model"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_started(
    words: list[str], said: str, tmp_path: Path
) -> None:
    target = tmp_path / "result.json"
    ran = CliRunner().invoke(app, ["bench", *words, "--json", str(target)], env={"COLUMNS": "200"})
    assert ran.exit_code == 2
    assert said in " ".join(ran.output.replace("│", " ").split())
    assert not target.exists()


def test_a_result_of_another_configuration_is_not_resumed(tmp_path: Path) -> None:
    target = str(tmp_path / "result.json")
    count = ["bench", "capacity", "--shape", "tiny", "--json", target]
    assert CliRunner().invoke(app, [*count, "--frames", "8"]).exit_code == 0
    ran = CliRunner().invoke(app, [*count, "--frames", "12", "--resume"], env={"COLUMNS": "200"})
    assert ran.exit_code == 2
    assert "leave out --resume" in ran.output
    assert [row["frames"] for row in json.loads(Path(target).read_text())["rows"]] == [8]


def test_without_a_place_the_result_has_the_suites_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["bench", "capacity", "--shape", "tiny", "--frames", "8"]).exit_code == 0
    written = (tmp_path / "capacity.json").read_text()
    assert json.loads(written)["suite"] == "capacity"
    again = ["bench", "capacity", "--shape", "tiny", "--frames", "12"]
    ran = CliRunner().invoke(app, again, env={"COLUMNS": "300"})
    assert ran.exit_code == 2
    assert "--resume keeps its cells, --overwrite replaces it" in ran.output
    assert (tmp_path / "capacity.json").read_text() == written
    assert CliRunner().invoke(app, [*again, "--overwrite"]).exit_code == 0
