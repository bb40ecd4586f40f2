"""Every plot is a picture with its labels, its intervals and a legend that covers no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from f2l_vllm.evaluation.diagnostics.ablation import layer_curves, rank_curves
from f2l_vllm.evaluation.plots import plot_diagnostics, plot_scores, plot_sweep, plot_training, style
from f2l_vllm.evaluation.questions import ARMS, CHUNKS, chunk_arm
from f2l_vllm.evaluation.scores import Scores
from tests.support.records import answer

KINDS = ("action", "colour", "count")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are saved, by file name."""
    figures: dict[str, Figure] = {}
    save = style.save

    def keep(of: Figure, path: Path) -> Path:
        figures[path.name] = of
        return save(of, path)

    monkeypatch.setattr(style, "save", keep)
    return figures


def estimate(value: float, name: str = "score") -> dict[str, Any]:
    return {name: value, "ci95": [value - 0.05, value + 0.02]}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """As `evaluate` returns it, scored from answers of which some are wrong."""
    answers = [
        answer(f"{video}.mp4", kind, arm, right=(video + place + number) % (place + 2) != 0)
        for place, arm in enumerate((*ARMS, *map(chunk_arm, CHUNKS)))
        for video in range(12)
        for number, kind in enumerate((*KINDS, "caption"))
    ]
    scores = Scores(answers, "exact_match", apart=frozenset({"caption"}))
    configuration = {"metric": "exact_match", "arms": list(ARMS)}
    return {"configuration": configuration, "table": scores.rows(ARMS), "composition": scores.composition()}


SWEEP = {
    "metric": "exact_match",
    "rows": [
        {
            "frames": frames,
            "resolution": edge,
            "arm": arm,
            **estimate(0.9 - 0.1 * (arm == "frames")),
            "n": 30,
            "videos": 10,
            "ttft_ms": {"first": {"median": 10.0 + frames}, "later": {"median": 9.0}},
            "prompt_tokens": 10.0 + frames * (arm == "frames"),
        }
        for frames in (4, 8, 64)
        for edge in (64, 320)
        for arm in ("adapter", "frames")
    ],
}
DIAGNOSTICS = {
    "metric": "exact_match",
    "videos": 10,
    "questions": 30,
    "rank": 16,
    "layers": 4,
    "modules": ["down_proj", "o_proj"],
    **{
        group: {name: [{"at": at, **estimate(0.5 + 0.01 * at)} for at, _ in curve] for name, curve in curves.items()}
        for group, curves in {"rank_ablation": rank_curves(16), "layer_removal": layer_curves(4)}.items()
    },
    "update_norm": {
        module: {"frobenius": [1.0, 2.0, 3.0, 4.0], "relative": [0.1, 0.2, 0.3, 0.4]}
        for module in ("down_proj", "o_proj")
    },
    "logit_attribution": {
        "lead": estimate(5.0, "mean"),
        "embedding": estimate(0.0, "mean"),
        "base": [estimate(value, "mean") for value in (0.5, 0.5, 0.5, 1.0)],
        "adapter": [estimate(value, "mean") for value in (-0.5, 1.0, 1.0, 1.0)],
    },
}


def assert_readable(figures: dict[str, Figure], paths: list[Path]) -> None:
    """Files are pictures with ink; figures say what they show, name their axes, and keep the legend off the data."""
    assert sorted(figures) == sorted(path.name for path in paths)
    for path in paths:
        image = Image.open(path)
        assert min(image.size) > 400
        assert np.asarray(image.convert("L")).std() > 10
        assert [other.name for other in path.parent.iterdir() if other.name.startswith(".")] == []
    for figure in figures.values():
        assert figure.get_suptitle()
        assert figure.get_supxlabel()
        assert any(at.get_xlabel() or at.get_title(loc="left") for at in figure.axes)
        figure.draw_without_rendering()
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not [at for at in figure.axes if box.overlaps(at.get_window_extent())]


def test_scores_have_a_bar_with_its_interval_for_every_type_and_arm(
    result: dict[str, Any], drawn: dict[str, Figure], tmp_path: Path
) -> None:
    paths = plot_scores(result, tmp_path / "plots")
    assert [path.name for path in paths] == ["scores.png", "composition.png"]
    assert_readable(drawn, paths)
    (at,) = drawn["scores.png"].axes
    assert [label.get_text() for label in at.get_yticklabels()] == ["mean over types", *KINDS, "caption (apart)"]
    widths = sorted(round(bar.get_width(), 4) for bar in at.patches)
    assert widths == sorted(row["arms"][arm]["score"] for row in result["table"] for arm in ARMS)
    ends = {round(float(x), 4) for line in at.collections for path in line.get_paths() for x in path.vertices[:, 0]}
    assert set(result["table"][0]["arms"]["adapter"]["ci95"]) <= ends
    chunks = drawn["composition.png"].axes[0]
    assert [label.get_text() for label in chunks.get_xticklabels()] == ["1 chunk", "2 chunks", "4 chunks"]
    assert f"{result['composition']['2 chunks']['score']:.3f}" in chunks.texts[1].get_text()


def test_bars_differ_by_more_than_colour(result: dict[str, Any], drawn: dict[str, Figure], tmp_path: Path) -> None:
    plot_scores(result, tmp_path)
    hatches = {bar.get_hatch() for bar in drawn["scores.png"].axes[0].patches}
    assert len(hatches) == len(ARMS)


def test_a_score_that_is_missing_has_no_bar(result: dict[str, Any], drawn: dict[str, Figure], tmp_path: Path) -> None:
    nothing = {"score": None, "ci95": None}
    table = [row | {"arms": row["arms"] | {"none": nothing}} for row in result["table"]]
    plot_scores({"configuration": result["configuration"], "table": table}, tmp_path)
    assert list(drawn) == ["scores.png"]
    missing = [bar for bar in drawn["scores.png"].axes[0].patches if np.isnan(bar.get_width())]
    assert len(missing) == len(table)


def test_sweep_has_a_cell_for_every_frames_resolution_and_arm(drawn: dict[str, Figure], tmp_path: Path) -> None:
    assert_readable(drawn, paths := plot_sweep(SWEEP, tmp_path))
    assert [path.name for path in paths] == ["sweep-heat-maps.png", "sweep-over-frames.png"]
    maps = [at for at in drawn["sweep-heat-maps.png"].axes if at.images]
    assert len(maps) == 8
    assert {len(at.texts) for at in maps} == {6}
    lines = drawn["sweep-over-frames.png"].axes[0].lines
    assert len(lines) == 4
    assert lines[0].get_ydata().tolist() == [0.9, 0.9, 0.9]


def test_times_that_nobody_measured_are_left_out(drawn: dict[str, Figure], tmp_path: Path) -> None:
    rows = [{**row, "ttft_ms": None} for row in SWEEP["rows"]]
    plot_sweep({"metric": "exact_match", "rows": rows}, tmp_path)
    assert len([at for at in drawn["sweep-heat-maps.png"].axes if at.images]) == 4


def test_diagnostics_have_their_four_pictures(drawn: dict[str, Figure], tmp_path: Path) -> None:
    paths = plot_diagnostics(DIAGNOSTICS, tmp_path)
    names = ["rank-ablation.png", "layer-removal.png", "update-norm.png", "logit-attribution.png"]
    assert [path.name for path in paths] == names
    assert_readable(drawn, paths)
    assert len(drawn["rank-ablation.png"].axes[0].lines) == 3
    assert len(drawn["layer-removal.png"].axes[0].patches) == 4
    heights = [bar.get_height() for bar in drawn["logit-attribution.png"].axes[0].patches]
    assert heights == [-0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 1.0]


def test_training_has_a_column_for_every_stage(drawn: dict[str, Figure], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [
        {"stage": stage, "step": step, "loss": 3.0 / step, "smoothed": 3.1 / step, "norm": 1.0, "factor": 0.5}
        for stage in ("vision", "hypernetwork")
        for step in range(1, 40, 10)
    ]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"stage": "hyp')  # a run that was killed
    assert_readable(drawn, plot_training(log, tmp_path / "plots"))
    panels = drawn["training.png"].axes
    assert len(panels) == 6
    assert [at.get_title(loc="left") for at in panels[:2]] == ["vision", "hypernetwork"]
    assert panels[0].lines[0].get_xdata().tolist() == [1, 11, 21, 31]


def test_a_log_of_other_figures_is_drawn_with_what_it_has(drawn: dict[str, Figure], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        "".join(f'{{"stage": "train", "step": {n}, "loss": 1.0, "lr": 0.1, "seconds": 2}}\n' for n in (1, 2))
    )
    plot_training(log, tmp_path)
    assert [at.get_ylabel() for at in drawn["training.png"].axes] == ["loss", "learning rate"]


@pytest.mark.parametrize(("text", "words"), [("", "no step"), ("no json\n", "line 1"), ('{"loss": 1}\n', "line 1")])
def test_a_file_that_is_no_log_is_refused(text: str, words: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(ValueError, match=words):
        plot_training(log, tmp_path)
