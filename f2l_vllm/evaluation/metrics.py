"""How an answer is scored against the true one. Pure functions of two texts."""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, truth: str) -> bool:
    """Whether the texts are equal, apart from white space around them."""
    return answer.strip() == truth.strip()


def token_f1(answer: str, truth: str) -> float:
    """F1 of the two texts' words, counted with repetition, in [0, 1].

    Words are those of SQuAD's evaluation: lower case, no punctuation, no articles. Two texts without words are equal.

    Source: Rajpurkar et al., SQuAD (arXiv 1606.05250), section 6.1.
    """
    given, wanted = words(answer), words(truth)
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """The words that token F1 counts."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
