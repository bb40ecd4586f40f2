"""Results are shown as they are: tables, sentences and pictures of recorded ones, of every suite."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console
from typer.testing import CliRunner

from f2l_vllm.bench import page, plots, report, run
from f2l_vllm.bench import suite as suites
from f2l_vllm.cli.main import app
from f2l_vllm.evaluation.plots import style

RECORDED = Path(__file__).parent / "recorded"
COMMITTED = Path(__file__).parents[3] / "benchmarks" / "results"
PICTURES = {"latency": ["latency-heat-maps.png", "latency.png", "first-token.png"]}


def recorded(name: str) -> dict[str, Any]:
    return run.measured(RECORDED / f"{name}.json")


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


@pytest.mark.parametrize("name", suites.names())
def test_a_page_has_the_table_and_every_picture_and_shows_names_as_text(name: str, tmp_path: Path) -> None:
    result = run.measured(RECORDED / f"{name}.json")
    result["configuration"]["model"] = "<script>alert(1)</script>"
    page.write(result, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count('src="data:image/png;base64,') == len(PICTURES.get(name, [name]))
    assert "<script" not in text
    found = ElementTree.fromstring("<table>" + text.split("<table>", 1)[1].split("</table>", 1)[0] + "</table>")
    assert [[cell.text for cell in row] for row in found.iter("tr")] == [
        *map(list, [report.grid(result)[0]]),
        *report.grid(result)[1],
    ]


def test_a_ramps_picture_marks_the_highest_rate_that_was_held(tmp_path: Path) -> None:
    result = run.measured(RECORDED / "ramp.json")
    assert result["highest"] is not None
    held = imread(plots.plot(result, tmp_path / "held")[0])
    none = imread(plots.plot(result | {"highest": None}, tmp_path / "none")[0])
    orange = [np.isclose(pixels[..., :3], to_rgb(style.ORANGE), atol=0.02).all(-1) for pixels in (held, none)]
    assert orange[0].any(0).sum() < orange[0].any(1).sum(), "a vertical line"
    assert not orange[1].any()


def test_a_cell_that_was_counted_shows_no_time_and_says_so() -> None:
    result = recorded("latency")
    counted = [row for row in report.grid(result)[1] if row[1] == "1024"]
    assert counted
    assert all(row[3:6] == ["–"] * 3 for row in counted)
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


@pytest.mark.parametrize("table", sorted(COMMITTED.glob("*.md")), ids=lambda path: path.stem)
def test_a_committed_table_is_what_its_result_says(table: Path) -> None:
    assert table.read_text() == report.markdown(run.measured(table.with_suffix(".json")))


def test_intervals_are_shown_where_the_values_carry_one() -> None:
    lines = report.markdown(run.measured(COMMITTED / "tax-500m.json")).splitlines()
    assert "| decode | 1 | no LoRA | 7 | 33.7 [31.8, 36.9] | 29.2 [26.8, 31.2] | 45.8 [44.0, 61.4] |" in lines
    few = report.markdown(run.measured(COMMITTED / "latency-tiny.json")).splitlines()
    assert "| adapter | 4 | 224 px | 3 | 10.4 | 10.7 | 27 | 66.7 kB |" in few


def test_a_result_is_shown_again_as_it_was_measured(tmp_path: Path) -> None:
    def bench(*words: str) -> tuple[int, str]:
        ran = CliRunner().invoke(app, ["bench", *words], env={"COLUMNS": "200"})
        return ran.exit_code, ran.output

    target, path = str(tmp_path / "again.md"), str(RECORDED / "ramp.json")
    code, said = bench(path, "--markdown", target)
    assert code == 0, said
    assert Path(target).read_text() == report.markdown(run.measured(RECORDED / "ramp.json"))
    assert bench(path, "--markdown", target)[0] == 2, "it was there"
    assert "is shown as it was measured" in bench(path, "--frames", "8")[1]
    (tmp_path / "other.json").write_text('{"suite": "speed"}')
    for name in ("other.json", "missing.json"):
        code, said = bench(str(tmp_path / name))
        assert (code, "is no result of 'f2l-vllm bench'" in said) == (2, True), said
