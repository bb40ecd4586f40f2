"""`python -m benchmarks.merging`: what merging visual tokens costs in answers, from the frames and from adapters.

The same questions about fresh videos of the synthetic world, at every rate of `f2l-vllm eval --merge-rate`: through a
server for each rate, or through transformers, which takes less time on a busy machine and answers alike. At rate 0 both
arms are what is served by default.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from f2l_vllm.bench import record
from f2l_vllm.evaluation.answers import ANSWERS_FILE, AnswerRecord, read_answers
from f2l_vllm.evaluation.questions import ADAPTER, FRAMES, NONE
from f2l_vllm.evaluation.run import evaluate
from f2l_vllm.evaluation.scores import Scores
from f2l_vllm.evaluation.setup import SERVER, WAYS, Setup
from f2l_vllm.evaluation.sources import world_questions


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Ask at every rate; every figure, and each rate's difference from rate 0 over the same questions."""
    questions = world_questions("held-out", options.videos, options.seed, work)
    setup = Setup(model=options.model, arms=(ADAPTER, FRAMES), through=options.through, concurrency=options.concurrency)
    answers: list[AnswerRecord] = []
    for rate in options.rates:
        folder = work / f"rate-{rate:g}"
        arms = (*setup.arms, NONE) if rate == 0 else setup.arms
        evaluate(questions, replace(setup, arms=arms, merge_rate=rate), folder)
        answers += [replace(one, arm=_named(one.arm, rate)) for one in read_answers(folder / ANSWERS_FILE)]
    scores = Scores(answers, questions.metric, apart=questions.apart)
    rows = []
    for arm in (ADAPTER, FRAMES):
        for rate in options.rates:
            row = {"arm": f"{arm}-merged", "rate": rate, **scores.arm(_named(arm, rate))}
            if rate:
                row["minus_rate_0"] = scores.comparison(_named(arm, rate), _named(arm, 0))
            rows.append(row)
    return {"rows": rows, "without_the_video": scores.arm(_named(NONE, 0))}


def _named(arm: str, rate: float) -> str:
    return f"{arm} at {rate:g}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 0.3, 0.5, 0.7], help="the first must be 0")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--through", choices=WAYS, default=SERVER)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--work", type=Path, help="folder for videos and answers, to resume in; default: temporary")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.rates[0] != 0:
        parser.error("the first rate must be 0: the others are compared with it")
    with TemporaryDirectory(prefix="f2l-merging-") as temporary:
        results = measure(options, options.work or Path(temporary))
    names = ("model", "rates", "videos", "seed", "through", "concurrency")
    record.write(options.json, {name: getattr(options, name) for name in names}, results)


if __name__ == "__main__":
    main()
