"""The recipe's report and an evaluation's speak of the same arms."""

from f2l_vllm.evaluation import questions
from f2l_vllm.recipes.f2l_tiny import score


def test_every_arm_has_one_word():
    assert score.ARMS == questions.ARMS
