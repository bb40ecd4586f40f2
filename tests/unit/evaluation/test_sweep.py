"""A sweep asks the same questions at every number of frames and every resolution, about files that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import pytest

from f2l_vllm.evaluation import footage, sweep
from f2l_vllm.evaluation.answers import read_answers
from f2l_vllm.evaluation.questions import QuestionSet
from f2l_vllm.evaluation.setup import Setup
from f2l_vllm.evaluation.sources import world_questions
from f2l_vllm.evaluation.sweep import Grid
from f2l_vllm.synthetic.render import fit
from f2l_vllm.synthetic.world import sample_scenes
from tests.support.records import answer
from tests.support.videos import write_video

GRID = Grid(frames=(4, 8), resolutions=(64, 160))
SETUP = Setup(through="transformers", max_tokens=16)


def size_of(path: Path) -> tuple[int, int]:
    with av.open(str(path)) as container:
        return container.streams.video[0].width, container.streams.video[0].height


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def filmed(work: Path) -> tuple[QuestionSet, dict[str, int]]:
    questions = world_questions("held-out", 2, 3, work)
    film = footage.of_scenes(sample_scenes(2, 3, "held-out"), seconds=2)
    return footage.at_resolutions(questions, film, GRID.resolutions, work / "sweep" / "videos", {"seconds": 2})


@pytest.fixture(scope="module")
def found(filmed: tuple[QuestionSet, dict[str, int]], work: Path) -> dict[str, Any]:
    return json.loads(json.dumps(sweep.sweep(*filmed, SETUP, GRID, work / "sweep")))


def test_every_cell_has_both_arms_with_score_interval_and_tokens(found: dict[str, Any]) -> None:
    cells = [(row["frames"], row["resolution"], row["arm"]) for row in found["rows"]]
    assert cells == [(f, r, arm) for f in (4, 8) for r in (64, 160) for arm in ("adapter", "frames")]
    for row in found["rows"]:
        assert (row["n"], row["videos"]) == (20, 2)  # captions are apart
        assert row["through"] == "transformers"
        assert row["ttft_ms"] is None  # nothing is streamed
        low, high = row["ci95"]
        assert low <= row["score"] <= high
        assert row["visual_tokens"] == (0 if row["arm"] == "adapter" else 4 * row["frames"])
        if row["arm"] == "frames":
            assert row["prompt_tokens"] > row["visual_tokens"]
    assert found["skipped"] == []


def test_a_cells_score_is_that_of_its_own_answers(found: dict[str, Any], work: Path) -> None:
    answers = read_answers(work / "sweep" / "8-frames" / "answers.jsonl")
    some = [a for a in answers if a.id.startswith("160px/") and a.arm == "adapter" and a.type != "caption"]
    (row,) = (r for r in found["rows"] if (r["frames"], r["resolution"], r["arm"]) == (8, 160, "adapter"))
    assert row["score"] == pytest.approx(sum(a.exact_match for a in some) / len(some), abs=1e-4)
    assert row["score"] > 0.5


def test_a_sweep_that_was_stopped_goes_on_with_what_is_missing(
    filmed: tuple[QuestionSet, dict[str, int]], found: dict[str, Any], work: Path
) -> None:
    log = work / "sweep" / "4-frames" / "answers.jsonl"
    whole = log.read_text()
    kept = whole.splitlines(keepends=True)[:30]
    log.write_text("".join(kept))
    assert sweep.sweep(*filmed, SETUP, GRID, work / "sweep")["rows"] == found["rows"]
    assert log.read_text().startswith("".join(kept))
    assert len(log.read_text().splitlines()) == len(whole.splitlines())


def test_scenes_are_filmed_at_their_shape_and_length(filmed: tuple[QuestionSet, dict[str, int]], work: Path) -> None:
    questions, edge_of = filmed
    assert [size_of(clip.path) for clip in questions.clips] == [(64, 48), (64, 36), (160, 120), (160, 90)]
    assert all((work / "sweep" / "4-frames" / clip.id).resolve() == clip.path.resolve() for clip in questions.clips)
    assert {edge_of[question.id] for question in questions.clips[0].questions} == {64}
    with av.open(str(questions.clips[0].path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 20


def test_files_are_scaled_down_and_keep_their_times(work: Path, tmp_path: Path) -> None:
    questions = world_questions("held-out", 2, 3, work)
    film = footage.of_files(questions.clips)
    small, _ = footage.at_resolutions(questions, film, (64, 4000), tmp_path / "videos", {})
    sizes = [size_of(clip.path) for clip in questions.clips]
    assert [size_of(clip.path) for clip in small.clips] == [fit(size, 64) for size in sizes] + sizes
    for clip, source in zip(small.clips, (*questions.clips, *questions.clips), strict=True):
        times = []
        for path in (clip.path, source.path):
            with av.open(str(path)) as container:
                times.append([frame.time for frame in container.decode(video=0)])
        assert times[0] == pytest.approx(times[1], abs=1e-3)


def test_a_file_is_made_once_and_never_left_half_made(work: Path, tmp_path: Path) -> None:
    questions = world_questions("held-out", 2, 3, work)
    made: list[Path] = []

    def film(index: int, edge: int, path: Path) -> None:
        if index == 1:
            raise KeyboardInterrupt
        made.append(write_video(path, frames=4, fps=4, size=(edge, edge)))

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            footage.at_resolutions(questions, film, (64,), tmp_path, {})
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["64px-0000.mp4"]


def test_first_and_later_questions_about_a_video_are_told_apart() -> None:
    answers = [
        answer(f"{video}.mp4", kind, ttft_ms=time)
        for video, times in enumerate(((50.0, 10.0, 12.0), (70.0, 14.0, 12.0)))
        for kind, time in zip(("colour", "shape", "count"), times, strict=True)
    ]
    times = sweep._first_token(answers)
    assert times == {"first": {"median": 60.0, "n": 2}, "later": {"median": 12.0, "n": 4}}


def test_sweeps_that_cannot_be_made_are_refused_at_once(work: Path, filmed: tuple[QuestionSet, dict[str, int]]) -> None:
    with pytest.raises(ValueError, match="leave out"):
        sweep.sweep(*filmed, Setup(base_url="http://127.0.0.1:1/v1"), GRID, work / "other")
    for wrong in ({"frames": ()}, {"frames": (4, 4)}, {"frames": (0,)}, {"resolutions": (1,)}):
        with pytest.raises(ValueError, match="different whole numbers"):
            Grid(**wrong)
