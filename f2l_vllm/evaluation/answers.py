"""Answers on disk: one JSON line each, appended when it arrives, so that a killed run goes on where it was.

A working folder holds `answers.jsonl` and, in `configuration.json`, what the answers depend on. Answers of another
configuration are never mixed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from f2l_vllm.evaluation.metrics import exact_match, token_f1
from f2l_vllm.evaluation.questions import Ask, Reply
from f2l_vllm.files import write_whole
from f2l_vllm.train.data.manifest import write_jsonl

ANSWERS_FILE = "answers.jsonl"
CONFIGURATION_FILE = "configuration.json"


@dataclass(frozen=True)
class AnswerRecord:
    """One answer and its scores, as a line of `answers.jsonl`.

    Attributes:
        id: the question's id.
        video: path of the video, relative to the working folder where it lies inside.
        source: as `Clip.source`: the unit of every interval and test.
        truth: the true answer.
        exact_match, f1: as in `metrics`.
        judge: the judge's score; None when there is none.
        prompt_tokens, visual_tokens, ttft_ms, seconds: as in `Reply`.
    """

    id: str
    video: str
    source: str
    question: str
    type: str
    dataset: str
    truth: str
    arm: str
    answer: str
    exact_match: bool
    f1: float
    judge: float | None
    prompt_tokens: int
    visual_tokens: int | None
    ttft_ms: float | None
    seconds: float

    @classmethod
    def of(cls, ask: Ask, reply: Reply) -> AnswerRecord:
        """Score a reply."""
        question = ask.question
        return cls(
            id=question.id,
            video=ask.clip.id,
            source=ask.clip.source,
            question=question.text,
            type=question.type,
            dataset=question.dataset,
            truth=question.truth,
            arm=ask.arm,
            answer=reply.text,
            exact_match=exact_match(reply.text, question.truth),
            f1=round(token_f1(reply.text, question.truth), 6),
            judge=None,
            prompt_tokens=reply.prompt_tokens,
            visual_tokens=reply.visual_tokens,
            ttft_ms=None if reply.ttft_ms is None else round(reply.ttft_ms, 2),
            seconds=round(reply.seconds, 4),
        )

    @property
    def key(self) -> tuple[str, str]:
        """(arm, question id): answered only once."""
        return self.arm, self.id


_FIELDS = {field.name for field in fields(AnswerRecord)}


def read_answers(path: Path) -> list[AnswerRecord]:
    """The answers of a file; an unfinished last line, left by a kill, is ignored.

    A line without `source` is about a whole video.

    Raises:
        ValueError: a line is not an answer; the message names file and line.
    """
    if not path.is_file():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    answers = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if isinstance(row, dict) and "video" in row:
                row.setdefault("source", row["video"])
            if not isinstance(row, dict) or set(row) != _FIELDS:
                raise ValueError(f"not an object with the fields {', '.join(sorted(_FIELDS))}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; remove the file, or name a new folder") from error
        answers.append(AnswerRecord(**row))
    return answers


class AnswerLog:
    """The answers of a working folder, held by one process at a time.

    Args:
        folder: made when it does not exist.
        configuration: what the answers depend on, as JSON.

    Raises:
        ValueError: the folder's answers have another configuration, or another process holds the folder.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / ANSWERS_FILE
        self._lock = FileLock(folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"another evaluation is at work in {folder}: wait, or name another folder") from None
        try:
            _check_configuration(folder / CONFIGURATION_FILE, configuration)
            self.answers = {answer.key: answer for answer in read_answers(self._path)}
            _drop_unfinished_line(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()
        self._lock.release()

    def append(self, answer: AnswerRecord) -> None:
        """Keep an answer; it is in the file when this returns."""
        self.answers[answer.key] = answer
        self._file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        self._file.flush()

    def replace(self, answers: Iterable[AnswerRecord]) -> None:
        """Replace the answers with the same keys by these; the file changes in one step."""
        self.answers |= {answer.key: answer for answer in answers}
        self._file.close()
        write_jsonl(self._path, (asdict(answer) for answer in self.answers.values()))
        self._file = self._path.open("a", encoding="utf-8")


def _check_configuration(path: Path, configuration: dict[str, Any]) -> None:
    configuration = json.loads(json.dumps(configuration))
    if not path.exists():
        write_whole(path, json.dumps(configuration, indent=1) + "\n")
        return
    kept = json.loads(path.read_text())
    if kept != configuration:
        other = [
            f"{name}: {kept.get(name)!r} there, {configuration.get(name)!r} here"
            for name in sorted({*kept, *configuration})
            if kept.get(name) != configuration.get(name)
        ]
        raise ValueError(
            f"{path.parent} holds answers of another configuration ({'; '.join(other)}): name another folder with "
            "--work, or repeat the command that made it"
        )


def _drop_unfinished_line(path: Path) -> None:
    if path.is_file():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
