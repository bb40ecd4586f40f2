"""Answers made up for tests of what comes after them."""

from __future__ import annotations

from typing import Any

from f2l_vllm.evaluation.answers import AnswerRecord


def answer(video: str, kind: str, arm: str = "adapter", right: bool = True, **changes: Any) -> AnswerRecord:
    """The answer to the question of a type about a video."""
    record: dict[str, Any] = {
        "id": f"{video}/{kind}",
        "video": video,
        "source": video,
        "question": f"What {kind}?",
        "type": kind,
        "dataset": "world, held-out",
        "truth": "Red.",
        "arm": arm,
        "answer": "Red." if right else "Blue.",
        "exact_match": right,
        "f1": float(right),
        "judge": None,
        "prompt_tokens": 10,
        "visual_tokens": 0,
        "ttft_ms": 20.0,
        "seconds": 0.1,
    }
    return AnswerRecord(**record | changes)
