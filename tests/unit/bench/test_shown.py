"""Results are shown as they are: tables, sentences and pictures of recorded ones, of every suite."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from f2l_vllm.bench import plots, report
from f2l_vllm.bench import suite as suites

RECORDED = Path(__file__).parent / "recorded"
PICTURES = {"latency": ["latency-heat-maps.png", "latency.png", "first-token.png"]}


def recorded(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    return result


@pytest.mark.parametrize("name", suites.names())
def test_a_table_has_a_line_for_every_row_and_says_where_it_was_measured(name: str) -> None:
    result = recorded(name)
    text = report.markdown(result)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(result["rows"]) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert result["command"] in text
    assert result["machine"]["cpu"] in text
    assert result["versions"]["vllm"] in text
    console = Console(file=StringIO(), width=200)
    console.print(report.table(result))
    assert console.file.getvalue().count("\n") >= len(result["rows"]) + 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", suites.names())
def test_pictures_are_pictures(name: str, tmp_path: Path) -> None:
    drawn = plots.plot(recorded(name), tmp_path)
    assert [path.name for path in drawn] == PICTURES.get(name, [f"{name}.png"])
    for path in drawn:
        pixels = imread(path)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 600
        assert pixels.std() > 0.01, "an empty picture"


def test_a_cell_that_was_counted_shows_no_time_and_says_so() -> None:
    result = recorded("latency")
    counted = [row for row in report.grid(result)[1] if row[1] == "1024"]
    assert counted
    assert all(row[3:5] == ["–", "–"] for row in counted)
    assert "counted" in report.sentences(result)[-1]


def test_a_result_with_one_arm_that_has_no_ratio_can_be_shown(tmp_path: Path) -> None:
    result = recorded("latency")
    result["rows"] = [row for row in result["rows"] if row["arm"] == "frames"]
    result["ratios"] = []
    assert "frames" in report.markdown(result)
    assert len(plots.plot(result, tmp_path)) == len(PICTURES["latency"])


def test_amortisation_says_from_when_an_adapter_pays_and_what_was_not_asked() -> None:
    told = "\n".join(report.sentences(recorded("amortise")))
    assert "adapter against frames: costs no more from " in told
    assert "frames was asked 4 questions" in told


def test_never_is_said_as_never() -> None:
    result = recorded("amortise")
    result["break_even"] = [{"arm": "adapter", "over": "frames-cached", "questions": None, "projected": None}]
    assert "however many questions" in report.sentences(result)[0]
