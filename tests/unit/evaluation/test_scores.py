import json
from dataclasses import replace

import numpy as np
import pytest

from f2l_vllm.evaluation.scores import Scores, macro_values
from tests.support.records import answer


def test_with_one_question_of_each_type_a_video_has_its_own_mean():
    rows = [("a", "colour", 1.0), ("a", "shape", 0.0), ("b", "colour", 1.0), ("b", "shape", 1.0)]
    assert macro_values(rows) == pytest.approx([0.5, 1.0])


def test_types_weigh_the_same_however_often_they_are_asked():
    rows = [("a", "colour", 1.0)] * 6 + [("b", "colour", 0.0), ("b", "shape", 0.0), ("c", "shape", 1.0)]
    values = macro_values(rows)
    assert len(values) == 3
    assert values.mean() == pytest.approx((6 / 7 + 1 / 2) / 2)


def test_unbalanced_questions_give_the_spread_of_a_ratio():
    """Two types, one of them asked about every second video: against resampling whole videos."""
    rng = np.random.default_rng(0)
    rows = []
    for video in range(200):
        level = rng.uniform(0.3, 0.9)
        asked = ["colour"] * (1 + video % 3) + ["shape"] * (video % 2)
        rows += [(f"{video:03d}", kind, float(rng.random() < level)) for kind in asked]
    by_video = {}
    for row in rows:
        by_video.setdefault(row[0], []).append(row)
    videos = list(by_video.values())

    def macro(some):
        flat = [row for rows in some for row in rows]
        return np.mean([np.mean([s for _, kind, s in flat if kind == k]) for k in ("colour", "shape")])

    resampled = [macro([videos[i] for i in rng.integers(0, 200, 200)]) for _ in range(400)]
    values = macro_values(rows)
    assert values.mean() == pytest.approx(macro(videos))
    assert values.std(ddof=1) / 200**0.5 == pytest.approx(np.std(resampled), rel=0.15)


def answers(arm, wrong=(), videos=8, kinds=("colour", "shape", "caption"), **changes):
    return [
        answer(f"v{video}", kind, arm, (video, kind) not in wrong, **changes)
        for video in range(videos)
        for kind in kinds
    ]


def test_captions_are_scored_apart():
    everything = answers("adapter", wrong={(0, "colour"), (1, "colour"), *((v, "caption") for v in range(6))})
    summary = Scores(everything, "exact_match", apart=frozenset({"caption"})).arm("adapter")
    assert summary["score"] == pytest.approx((6 / 8 + 1) / 2)
    assert summary["by_type"] == {"colour": 0.75, "shape": 1.0}
    assert (summary["n"], summary["videos"]) == (16, 8)
    assert summary["caption"]["exact_match"] == 0.25
    assert summary["caption"]["n"] == 8
    assert summary["ci95"][0] < summary["score"] < summary["ci95"][1]
    assert summary["cost"] == {"prompt_tokens": 10.0, "visual_tokens": 0.0, "ttft_ms": 20.0, "seconds": 0.1}


def test_arms_are_compared_on_the_questions_that_both_answered():
    ours = answers("adapter", wrong={(0, "colour"), (1, "shape")})
    theirs = answers("frames", wrong={(0, "colour")})[:-3]  # nothing about the last video
    found = Scores([*ours, *theirs], "exact_match").comparison("adapter", "frames")
    assert found["videos"] == 7
    assert found["n"] == 21
    assert found["difference"] == pytest.approx(-1 / 21, abs=1e-4)
    assert found["non_inferior"]["margin"] == 0.05
    assert found["other_metrics"]["f1"]["difference"] == found["difference"]


def test_spans_of_one_file_are_one_video():
    """Eight files, each cut into four spans that are answered alike: no surer than the eight files themselves."""
    wrong = {(0, "colour"), (1, "shape"), (2, "colour")}
    whole = [*answers("adapter", wrong), *answers("frames")]
    cut = [
        replace(one, video=f"{one.video}-{span}", id=f"{one.id}-{span}", source=one.video)
        for one in whole
        for span in range(4)
    ]
    of_files, of_spans = Scores(whole, "exact_match"), Scores(cut, "exact_match")
    assert of_spans.arm("adapter")["videos"] == of_spans.rows(["adapter"])[0]["videos"] == 8
    assert of_spans.arm("adapter")["ci95"] == of_files.arm("adapter")["ci95"]
    found, expected = (scores.comparison("adapter", "frames") for scores in (of_spans, of_files))
    assert found["n"] == 4 * expected["n"]
    for name in ("difference", "ci95", "videos", "non_inferior", "equivalent"):
        assert found[name] == expected[name]


def test_equal_answers_are_said_to_allow_no_test():
    found = Scores([*answers("adapter"), *answers("frames")], "exact_match").comparison("adapter", "frames")
    assert found["difference"] == 0.0
    assert found["equivalent"]["shown"] is None
    assert found["equivalent"]["note"] == "every video has the same value"


def test_answers_without_a_judges_score_are_counted_and_not_scored():
    judged = answers("adapter", judge=4.0)
    judged[0] = answer("v0", "colour", judge=None)
    summary = Scores(judged, "judge").arm("adapter")
    assert summary["score"] == 4.0
    assert summary["unjudged"] == 1
    assert summary["n"] == 24


@pytest.mark.parametrize(("mean", "half", "shown"), [(-0.108, 0.010, True), (-0.198, 0.038, False)])
def test_the_judges_margins_give_the_papers_verdicts(mean, half, shown):
    """Tables 1 and 4 of Frames2LoRA, on its scale of 0 to 1: VDC at 500M and PLM-SGQA at 2.2B, with half of the
    interval."""
    spread = 5 * half * 10 / 1.98  # of 100 videos, whose mean has that interval
    pairs = [
        (
            answer(f"v{video}", "what", "adapter", judge=4 + 5 * mean + spread * (-1) ** video),
            answer(f"v{video}", "what", "frames", judge=4.0),
        )
        for video in range(100)
    ]
    found = Scores([one for pair in pairs for one in pair], "judge").comparison("adapter", "frames")
    assert found["difference"] == pytest.approx(5 * mean)
    assert found["non_inferior"]["shown"] is found["equivalent"]["shown"] is shown


def test_an_arm_without_answers_has_no_score():
    scores = Scores(answers("adapter"), "exact_match")
    assert scores.arm("frames")["score"] is None
    assert scores.comparison("adapter", "frames")["difference"] is None


def test_composition_is_relative_to_one_chunk():
    everything = [
        *answers("1 chunk", wrong={(0, "colour")}),
        *answers("2 chunks", wrong={(0, "colour"), (1, "shape")}),
        *answers("4 chunks", wrong={(v, "shape") for v in range(4)} | {(0, "colour")}),
    ]
    table = Scores(everything, "exact_match", apart=frozenset({"caption"})).composition()
    assert table["1 chunk"]["ratio"]["value"] == 1.0
    assert table["2 chunks"]["ratio"]["value"] == pytest.approx(14 / 15, abs=1e-4)
    low, high = table["4 chunks"]["ratio"]["ci95"]
    assert low < 11 / 15 < high


def test_the_table_names_dataset_and_type_and_puts_types_apart_last():
    everything = answers("adapter") + answers("frames", wrong={(0, "shape"), (3, "shape")})
    rows = Scores(everything, "exact_match", apart=frozenset({"caption"})).rows(["adapter", "frames"])
    assert [row["type"] for row in rows] == ["mean over types", "colour", "shape", "caption"]
    assert rows[2]["comparison"]["difference"] == 0.25
    assert rows[0]["n"] == 16
    assert rows[-1]["apart"]


def test_types_of_two_datasets_are_two_types():
    everything = answers("adapter", dataset="one") + [
        answer(f"w{v}", "colour", right=False, dataset="two") for v in range(4)
    ]
    scores = Scores(everything, "exact_match")
    assert scores.arm("adapter")["by_type"]["one/colour"] == 1.0
    assert scores.arm("adapter")["by_type"]["two/colour"] == 0.0
    assert scores.arm("adapter")["score"] == 0.75
    assert {(row["dataset"], row["type"]) for row in scores.rows(["adapter"])[1:]} == {
        ("one", "colour"),
        ("one", "shape"),
        ("one", "caption"),
        ("two", "colour"),
    }


def test_everything_is_json():
    scores = Scores(answers("adapter") + answers("frames", wrong={(0, "shape")}), "exact_match")
    record = [scores.arm("adapter"), scores.comparison("adapter", "frames"), scores.rows(["adapter", "frames"])]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
