"""`python -m benchmarks.precision --json FILE`: does a model that reads videos in bf16, as on a GPU, cost answers?

The default model reads fresh videos of the synthetic world in fp32 and in bf16. The hypernetwork computes in fp32 both
times, and the same model in fp32 answers the same questions from both adapters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from f2l_vllm import models
from f2l_vllm.evaluation import environment
from f2l_vllm.evaluation.answers import AnswerRecord
from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import ADAPTER, Skipped, plan
from f2l_vllm.evaluation.scores import Scores
from f2l_vllm.evaluation.sources import world_questions
from f2l_vllm.files import write_whole
from f2l_vllm.hypernetwork.adapter import apart
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.video.reading import ReadingOptions

MODEL = models.DEFAULT_MODEL
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Ask, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    answers: dict[str, list[AnswerRecord]] = {name: [] for name in DTYPES}
    skipped: list[Skipped] = []
    with tempfile.TemporaryDirectory(prefix="f2l-bench-") as folder:
        questions = world_questions("held-out", options.videos, options.seed, Path(folder))
        answerer = TransformersAnswers(MODEL, None, ReadingOptions(), max_tokens=64)
        readers = {
            name: Internalizer.load(models.resolve(MODEL), models.resolve_hypernetwork(MODEL, None), dtype=dtype)
            for name, dtype in DTYPES.items()
        }
        changes = [apart(*(reader.internalize(clip.path) for reader in readers.values())) for clip in questions.clips]
        for name, reader in readers.items():
            answerer.internalizer = reader
            answerer.answer(
                plan(questions.clips, (ADAPTER,)),
                lambda ask, reply, name=name: answers[name].append(AnswerRecord.of(ask, reply)),
                skipped.append,
            )
    assert not skipped, skipped
    scores = {
        name: Scores(some, questions.metric, apart=questions.apart).arm(ADAPTER) for name, some in answers.items()
    }
    pairs = list(zip(*answers.values(), strict=True))
    result: dict[str, Any] = {
        "videos": options.videos,
        "seed": options.seed,
        "questions": len(pairs),
        "adapters_apart": {"median": statistics.median(changes), "max": max(changes)},
        "same_answers": sum(one.answer == other.answer for one, other in pairs),
        "scores": scores,
        "machine": environment.machine(),
        "versions": environment.versions(),
    }
    write_whole(options.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps(scores), result["same_answers"], "of", len(pairs), "answers the same")


if __name__ == "__main__":
    main()
