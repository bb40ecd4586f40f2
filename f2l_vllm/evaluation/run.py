"""An evaluation from questions to figures: answer the questions without an answer, judge, score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from f2l_vllm import models
from f2l_vllm.evaluation import environment
from f2l_vllm.evaluation.answers import AnswerLog, AnswerRecord
from f2l_vllm.evaluation.judge import Judge
from f2l_vllm.evaluation.questions import (
    ADAPTER,
    DROPPING_ARMS,
    Ask,
    QuestionSet,
    Reply,
    Skipped,
    chunk_arm,
    chunks_of,
    plan,
)
from f2l_vllm.evaluation.scores import F1, JUDGE, MARGINS, Scores
from f2l_vllm.evaluation.server import ServerAnswers, started_server
from f2l_vllm.evaluation.setup import TRANSFORMERS, Setup
from f2l_vllm.store.address import fingerprint

Progress = Callable[[str, int, int], None]  # stage, done, of how many
JUDGEMENTS_FOLDER = "judgements"


def evaluate(questions: QuestionSet, setup: Setup, work: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Ask every question in every arm and score the answers.

    Answers in `work` from an earlier evaluation of the same configuration are used again.

    Returns:
        as JSON: `arms`, `comparisons`, `table`, `composition`, `skipped`, `configuration`, `machine`, `versions`; see
        docs/evaluation.md.

    Raises:
        ValueError: something cannot be asked, or `work` holds answers of another configuration.
        ServerFailed: the server did not start.
        openai.APIError: the server or the judge stopped answering; the answers so far are kept.
    """
    report = on_progress or (lambda stage, done, total: None)
    asks = plan(questions.clips, (*setup.arms, *map(chunk_arm, setup.composition)))
    skipped = list(questions.skipped)
    identity = identity_of(questions, setup)
    with AnswerLog(work, identity) as log:
        _name_sources(asks, log)
        _answer(asks, setup, log, skipped, report)
        keys = [(ask.arm, ask.question.id) for ask in asks]
        judged_by = _judge(log, keys, setup, work, report)
        answers = [log.answers[key] for key in keys if key in log.answers]
    metric = setup.metric or (JUDGE if setup.judge and questions.metric == F1 else questions.metric)
    margins = {
        "non_inferiority_margins": MARGINS | ({} if setup.margin is None else {metric: setup.margin}),
        "equivalence_margins": MARGINS
        | ({} if setup.equivalence_margin is None else {metric: setup.equivalence_margin}),
    }
    scores = Scores(answers, metric, apart=questions.apart, **margins)
    report("scoring", 0, 1)
    main = ADAPTER if ADAPTER in setup.arms else setup.arms[0]
    result = {
        "arms": {arm: scores.arm(arm) for arm in setup.arms},
        "comparisons": {f"{main} - {arm}": scores.comparison(main, arm) for arm in setup.arms if arm != main},
        "table": scores.rows(setup.arms),
        "skipped": [asdict(one) for one in skipped],
        "configuration": identity
        | {
            "arms": list(setup.arms),
            "metric": metric,
            "types_apart": sorted(questions.apart),
            **margins,
            "judge": judged_by,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": environment.machine(),
        "versions": environment.versions(),
    }
    if setup.composition:
        result["composition"] = scores.composition(setup.composition)
    report("scoring", 1, 1)
    return result


def identity_of(questions: QuestionSet, setup: Setup) -> dict[str, Any]:
    """What answers depend on, as JSON."""
    identity: dict[str, Any] = {
        **questions.identity,
        "through": setup.through,
        "max_frames": setup.max_frames,
        "max_tokens": setup.max_tokens,
    }
    if setup.base_url is not None:
        identity["served_model"] = _server_answers(setup, setup.base_url).base_model()
    if setup.needs_models:
        identity["model"] = setup.model
        identity["model_revision"] = fingerprint(models.resolve(setup.model))
        weights = models.resolve_hypernetwork(setup.model, setup.hypernetwork)
        identity["hypernetwork_revision"] = fingerprint(weights)
    if setup.serve_flags:
        identity["serve_flags"] = setup.serve_flags
    if setup.merge_rate:
        identity["merge_rate"] = setup.merge_rate
    if setup.drops:
        identity["keep_rate"] = setup.keep_rate
    return identity


def _name_sources(asks: list[Ask], log: AnswerLog) -> None:
    """Correct the answers' sources: a line without `source` is read as about a whole video, but may be about a span."""
    kept = [(log.answers[ask.arm, ask.question.id], ask) for ask in asks if (ask.arm, ask.question.id) in log.answers]
    wrong = [replace(answer, source=ask.clip.source) for answer, ask in kept if answer.source != ask.clip.source]
    if wrong:
        log.replace(wrong)


def _answer(asks: list[Ask], setup: Setup, log: AnswerLog, skipped: list[Skipped], report: Progress) -> None:
    """Ask the questions whose answers the log does not hold."""
    left = [ask for ask in asks if (ask.arm, ask.question.id) not in log.answers]
    local = [setup.through == TRANSFORMERS or ask.arm in DROPPING_ARMS or bool(chunks_of(ask.arm)) for ask in left]
    in_process = [ask for ask, here in zip(left, local, strict=True) if here]
    of_server = [ask for ask, here in zip(left, local, strict=True) if not here]
    done = len(asks) - len(left)

    def on_reply(ask: Ask, reply: Reply) -> None:
        nonlocal done
        log.append(AnswerRecord.of(ask, reply))
        done += 1
        report("answering", done, len(asks))

    report("answering", done, len(asks))
    if of_server and setup.base_url is not None:
        _server_answers(setup, setup.base_url).answer(of_server, on_reply, skipped.append)
    elif of_server:
        report("starting the server", 0, 1)
        rate = setup.merge_rate
        flags = f"{setup.serve_flags} --video-pruning-rate {rate} --merge-rate {rate}" if rate else setup.serve_flags
        with started_server(setup.model, setup.hypernetwork, setup.max_frames, flags) as base_url:
            report("starting the server", 1, 1)
            _server_answers(setup, base_url).answer(of_server, on_reply, skipped.append)
    if in_process:
        from f2l_vllm.evaluation.in_process import TransformersAnswers

        answerer = TransformersAnswers(
            setup.model,
            setup.hypernetwork,
            setup.reading,
            max_tokens=setup.max_tokens,
            keep_rate=setup.keep_rate,
        )
        answerer.answer(in_process, on_reply, skipped.append)


def _server_answers(setup: Setup, base_url: str) -> ServerAnswers:
    return ServerAnswers(
        base_url,
        setup.api_key,
        concurrency=setup.concurrency,
        max_tokens=setup.max_tokens,
    )


def _judge(
    log: AnswerLog, keys: list[tuple[str, str]], setup: Setup, work: Path, report: Progress
) -> dict[str, Any] | None:
    """Judge these answers and put the scores into the log; returns the judge's configuration."""
    if setup.judge is None:
        return None
    by = setup.judge
    judge = Judge(by.base_url, by.model, by.api_key, work / JUDGEMENTS_FOLDER, setup.concurrency, by.rubric)
    answers = [log.answers[key] for key in keys if key in log.answers]
    judgements = judge.score(answers, lambda done, total: report("judging", done, total))
    log.replace(replace(answer, judge=judgements[answer.key].score) for answer in answers)
    return judge.configuration()
