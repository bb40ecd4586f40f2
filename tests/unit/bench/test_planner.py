"""The planner's sums are those one would do by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from f2l_vllm.bench import planner
from f2l_vllm.bench.break_even import questions as break_even
from f2l_vllm.cli.main import app

# Arm -> seconds at 8 and at 32 frames.
TIMES = {"adapter": (0.1, 0.1), "adapter-cold": (6.0, 24.0), "frames": (5.0, 21.0), "frames-cached": (0.2, 0.4)}
ADAPTER_BYTES, KV_BYTES_PER_FRAME = 7_000_000, 2_500_000
MACHINE = {"device": "NVIDIA H100 80GB HBM3", "cpu": "AMD EPYC", "cores": 16}


def write(path: Path, times: dict[str, tuple[float, ...]], frames: tuple[int, ...] = (8, 32), edge: int = 384) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "arm": arm,
            "frames": count,
            "resolution": edge,
            "ttft_ms": {"median": seconds * 1e3},
            "state_bytes": ADAPTER_BYTES if arm.startswith("adapter") else KV_BYTES_PER_FRAME * count,
        }
        for arm, both in times.items()
        for count, seconds in zip(frames, both, strict=True)
    ]
    rows.append({**rows[-1], "frames": 1024, "ttft_ms": None})  # a counted cell is no time
    content = {"suite": "latency", "configuration": {"model": "500m"}, "machine": MACHINE, "rows": rows}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def measured(tmp_path: Path) -> planner.Measured:
    return planner.Measured([write(tmp_path / "latency.json", TIMES)])


def ways(measured: planner.Measured, frames: int, questions: int, videos: int, memory: float) -> dict[str, Any]:
    found = planner.plan(measured, planner.Need(frames, questions, videos, memory))
    return {"best": found["best"], **{way["way"]: way for way in found["ways"]}} | {"plan": found}


def test_totals_are_first_questions_and_later_ones(measured: planner.Measured) -> None:
    found = ways(measured, frames=8, questions=10, videos=4, memory=1e9)
    assert found["adapter"]["total_s"] == pytest.approx(4 * 6.0 + 4 * 9 * 0.1)
    assert found["kv"]["total_s"] == pytest.approx(4 * 5.0 + 4 * 9 * 0.2)
    assert found["frames"]["total_s"] == pytest.approx(4 * 10 * 5.0)
    assert found["adapter"]["state_bytes"] == 4 * ADAPTER_BYTES
    assert found["kv"]["state_bytes"] == 4 * 8 * KV_BYTES_PER_FRAME
    assert found["frames"]["state_bytes"] == 0
    assert found["best"] == "kv"


def test_videos_whose_kv_does_not_fit_are_read_again(measured: planner.Measured) -> None:
    quarter = 100 * 8 * KV_BYTES_PER_FRAME / 4
    found = ways(measured, frames=8, questions=11, videos=100, memory=quarter)
    assert found["kv"]["kept"] == 0.25
    assert found["kv"]["total_s"] == pytest.approx(100 * 5.0 + 1000 * (0.25 * 0.2 + 0.75 * 5.0))
    assert found["adapter"]["kept"] == pytest.approx(quarter / (100 * ADAPTER_BYTES), abs=1e-4)
    assert found["best"] == "adapter"
    assert any("read from disk again" in line for line in found["plan"]["assumptions"])


def test_break_even_counts_questions_about_a_video(measured: planner.Measured) -> None:
    found = ways(measured, frames=8, questions=2, videos=1, memory=1e9)["plan"]["break_even"]
    # 6 + 0.1 (q - 1) <= 5 q from q = 2 on; 6 + 0.1 (q - 1) <= 5 + 0.2 (q - 1) from q = 11 on.
    assert found == {"frames": 2, "kv": 11}


@pytest.mark.parametrize(
    ("ours", "other", "count"),
    [((5, 1), (5, 9), 1), ((6, 1), (5, 1), None), ((6, 2), (5, 1), None), ((6, 1), (5, 2), 2), ((8, 1), (5, 2.5), 3)],
)
def test_break_even_of_two_ways(ours: tuple[float, float], other: tuple[float, float], count: int | None) -> None:
    assert break_even(*ours, *other) == count
    if count is not None:

        def total(way: tuple[float, float], questions: int) -> float:
            return way[0] + way[1] * (questions - 1)

        assert total(ours, count) <= total(other, count)
        assert count == 1 or total(ours, count - 1) > total(other, count - 1)


@pytest.mark.parametrize(("frames", "seconds"), [(8, 5.0), (20, 13.0), (32, 21.0), (56, 37.0), (2, 5.0)])
def test_times_lie_on_straight_lines_and_never_below_the_measured(
    measured: planner.Measured, frames: int, seconds: float
) -> None:
    assert measured.seconds("frames", frames) == pytest.approx(seconds)


def test_a_single_number_of_frames_is_scaled_but_for_the_adapter(tmp_path: Path) -> None:
    times = {arm: (both[0],) for arm, both in TIMES.items()}
    measured = planner.Measured([write(tmp_path / "one.json", times, frames=(8,))])
    assert measured.seconds("frames", 16) == pytest.approx(10.0)
    assert measured.seconds("adapter", 16) == pytest.approx(0.1)


def test_the_nearest_resolution_is_read(tmp_path: Path) -> None:
    slow = {arm: tuple(2 * value for value in both) for arm, both in TIMES.items()}
    files = [write(tmp_path / "384.json", TIMES), write(tmp_path / "1024.json", slow, edge=1024)]
    assert planner.Measured(files).seconds("frames", 8) == 5.0
    assert planner.Measured(files, resolution=900).seconds("frames", 8) == 10.0


def test_ways_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    times = {arm: TIMES[arm] for arm in ("adapter", "adapter-cold", "frames")}
    found = ways(planner.Measured([write(tmp_path / "latency.json", times)]), 8, 2, 1, 1e9)
    assert "kv" not in found
    few = planner.Measured([write(tmp_path / "few.json", {"frames": TIMES["frames"]})])
    with pytest.raises(ValueError, match="adapter-cold"):
        planner.plan(few, planner.Need(8, 2, 1, 1e9))


def test_tables_of_two_models_do_not_mix(tmp_path: Path) -> None:
    other = json.loads(write(tmp_path / "a.json", TIMES).read_text())
    other["configuration"]["model"] = "2.2b"
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"2\.2b, 500m"):
        planner.Measured([tmp_path / "a.json", tmp_path / "b.json"])


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no\.json is no result"):
        planner.Measured([tmp_path / "no.json"])


def test_a_shape_without_a_table_says_how_to_measure_it() -> None:
    with pytest.raises(ValueError, match="f2l-vllm bench latency --shape 7b"):
        planner.tables("7b", MACHINE)


def test_this_repositorys_tables_speak_for_the_machine_that_measured_them_alone() -> None:
    there = planner.RESULTS / "latency-500m.json"
    assert planner.tables("500m", json.loads(there.read_text())["machine"]) == [there]
    with pytest.raises(ValueError, match="this is NVIDIA H100 80GB HBM3") as refused:
        planner.tables("500m", MACHINE)
    assert "measured on 2 cores of AMD EPYC, and" in str(refused.value)
    assert f"give --measured {there}" in str(refused.value)


def test_what_was_measured_on_a_machine_like_this_one_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "RESULTS", tmp_path)
    folder = tmp_path / "NVIDIA-H100-80GB-HBM3"
    folder.mkdir()
    own, _ = write(folder / "latency-500m.json", TIMES), write(tmp_path / "latency-500m.json", TIMES)
    assert planner.tables("500m", MACHINE) == [own]


def test_the_command_refuses_tables_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f2l_vllm.evaluation.environment.machine", lambda: MACHINE)
    needs = ["--frames", "8", "--questions", "10", "--videos", "4", "--memory", "1"]
    refused = CliRunner().invoke(app, ["plan", *needs])
    assert refused.exit_code == 2
    assert "was measured on 2 cores of AMD EPYC" in refused.output
    told = CliRunner().invoke(app, ["plan", *needs, "--measured", str(planner.RESULTS / "latency-500m.json")])
    assert told.exit_code == 0, told.output
    assert "times of 2 cores of AMD EPYC" in told.output


def test_the_command_shows_the_sums_and_writes_them(tmp_path: Path) -> None:
    table, target = write(tmp_path / "latency.json", TIMES), tmp_path / "plan.json"
    needs = ["--frames", "8", "--questions", "10", "--videos", "4", "--memory", "1"]
    ran = CliRunner().invoke(app, ["plan", *needs, "--measured", str(table), "--json", str(target)])
    assert ran.exit_code == 0, ran.output
    assert "later ones: 36 x 0.100 s = 3.6 s" in ran.output
    assert "adapters cost no more than frames every time: from 2 questions about a video on" in ran.output
    assert json.loads(target.read_text())["best"] == "kv"
