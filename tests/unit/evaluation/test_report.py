from f2l_vllm.evaluation.report import comparison_lines, markdown
from f2l_vllm.evaluation.scores import MARGINS, Scores
from tests.support.records import answer


def result(arms=("adapter", "frames"), **extra):
    """Ten videos, two types; the adapter is wrong twice, the frames never."""
    wrong = {("v3", "colour"), ("v7", "shape")}
    answers = [
        answer(f"v{video}", kind, arm, arm != "adapter" or (f"v{video}", kind) not in wrong)
        for arm in arms
        for video in range(10)
        for kind in ("colour", "shape")
    ]
    scores = Scores(answers, "exact_match")
    return {
        "arms": {arm: scores.arm(arm) for arm in arms},
        "comparisons": {f"adapter - {arm}": scores.comparison("adapter", arm) for arm in arms[1:]},
        "table": scores.rows(arms),
        "skipped": [],
        "configuration": {
            "arms": list(arms),
            "metric": "exact_match",
            "types_apart": [],
            "non_inferiority_margins": MARGINS,
            "equivalence_margins": MARGINS,
        },
        **extra,
    }


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_scores_difference_and_verdicts():
    lines = markdown(result()).splitlines()
    header, _, total, colour, _ = lines[2:]
    assert cells(header) == [
        "dataset",
        "type",
        "n",
        "adapter",
        "frames",
        "adapter − frames",
        "non-inferior",
        "equivalent",
    ]
    assert cells(total)[:3] == ["world, held-out", "mean over types", "20"]
    assert cells(total)[3].startswith("0.900 [")
    assert cells(total)[4] == "1.000"  # equal values have no interval
    assert cells(total)[5].startswith("-0.100 [-0.2")
    assert cells(total)[6:] == ["not shown", "not shown"]
    assert cells(colour)[1:3] == ["colour", "10"]
    assert "margin of 0.05" in lines[0]


def test_without_frames_there_is_no_comparison_to_show():
    found = result(arms=("adapter",))
    assert "non-inferior |" not in markdown(found)
    assert comparison_lines(found) == []


def test_what_was_left_out_is_listed_with_its_reason():
    found = markdown(result(skipped=[{"video": "a.mp4", "reason": "not_a_video: no", "arm": None}]))
    assert "Left out (1):" in found
    assert "- a.mp4: not_a_video: no" in found


def test_the_verdicts_are_said_in_a_line():
    (line,) = comparison_lines(result())
    assert line.startswith("adapter − frames: -0.100 [")
    assert line.endswith("non-inferior (margin 0.05): not shown; equivalent (±0.05): not shown")
