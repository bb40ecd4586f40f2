import pytest

from f2l_vllm.evaluation.metrics import exact_match, token_f1


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("Red.", "Red.", True),
        ("  Red.\n", "Red.", True),
        ("Red", "Red.", False),
        ("red.", "Red.", False),
        ("", "Red.", False),
    ],
)
def test_exact_match_forgives_white_space_around_only(answer, truth, same):
    assert exact_match(answer, truth) is same


@pytest.mark.parametrize(
    ("answer", "truth", "f1"),
    [
        ("The red circle!", "a red circle", 1.0),  # case, marks and articles do not count
        ("red square", "red circle", 0.5),  # 1 of 2, 1 of 2
        ("red", "A red circle moves left.", 2 * 1 * 0.25 / 1.25),  # precision 1, recall 1/4
        ("red red blue", "red green", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # a repeated word counts once
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("red", "", 0.0),
        ("The.", "a", 1.0),  # neither holds a word
        ("It's two-fold", "its twofold", 1.0),  # marks go without leaving a space
    ],
)
def test_token_f1_as_computed_by_hand(answer, truth, f1):
    assert token_f1(answer, truth) == pytest.approx(f1)
    assert token_f1(truth, answer) == pytest.approx(f1)
