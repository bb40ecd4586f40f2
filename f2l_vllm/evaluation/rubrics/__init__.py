"""What a judge is told: a text with `$question`, `$truth` and `$answer` for each rubric, and how a reply is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCALE = (0, 5)
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Rubric:
    """What a judge is told and how its reply is read.

    Attributes:
        name: of the text in this folder.
        field: the reply's key that holds the score.
        max_tokens: of a reply; room for a judge that thinks aloud.
    """

    name: str
    field: str = "score"
    max_tokens: int = 512

    @property
    def text(self) -> str:
        """The prompt, with `$question`, `$truth` and `$answer` in it."""
        return (_FOLDER / f"{self.name}.txt").read_text(encoding="utf-8")


# Appendix A of Frames2LoRA (arXiv 2606.04351) asks how much of the reference a caption covers, and takes the answer out
# of an output before it compares it. Fields, scale and limit are its own; the words are ours.
ANSWER, PAPER_CAPTION, PAPER_QUESTION = "answer", "paper-caption", "paper-question"
RUBRICS = {
    rubric.name: rubric
    for rubric in (
        Rubric(ANSWER),
        Rubric(PAPER_CAPTION, field="coverage_score", max_tokens=1024),
        Rubric(PAPER_QUESTION, max_tokens=1024),
    )
}
