"""Target answers for a manifest, written by a teacher. Each is saved when it arrives, so a killed run can go on.

Answers are appended to `OUT.partial`, whose first line says what they depend on; `OUT` appears when all are there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from f2l_vllm.train.data.clips import UnusableVideoError
from f2l_vllm.train.data.inspection import Rejection
from f2l_vllm.train.data.manifest import Example, read_manifest, write_manifest
from f2l_vllm.train.data.teacher import Teacher, TeacherAnswer

TEACHER, ORIGINAL = "teacher", "original_target_text"  # metadata of a target
NO_ANSWER = "empty_answer"

OnProgress = Callable[[int, int], None]  # examples done, examples in all


@dataclass(frozen=True)
class Shard:
    """Every `of`-th video of a manifest, starting with number `index`."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read e.g. `0/4`.

        Raises:
            ValueError: not i/n with 0 <= i < n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f"A shard is i/n with 0 <= i < n, such as 0/4, not {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def take(self, examples: Sequence[Example]) -> list[Example]:
        """The shard's examples. A video's examples share a shard; the shards 0/n to (n-1)/n are the whole."""
        places = {video: place for place, video in enumerate(dict.fromkeys(e.video_path for e in examples))}
        return [example for example in examples if places[example.video_path] % self.of == self.index]


def write_targets(
    manifest: Path,
    output: Path,
    teacher: Teacher,
    shard: Shard | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[list[Example], list[Rejection]]:
    """Let the teacher answer every example of a manifest, or of a shard of it, and write them as a manifest.

    The same call resumes a run that ended early. Videos that cannot be used and empty answers are left out; a resumed
    run tries them again.

    Returns:
        The examples written, with their new targets, and what was left out.

    Raises:
        ValueError: a bad manifest, an output that exists, or one that was begun with other settings.
        TeacherError: the teacher cannot go on; its answers so far are kept.
    """
    shard = shard or Shard()
    examples = shard.take(read_manifest(manifest))
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    settings = {**teacher.settings, "shard": f"{shard.index}/{shard.of}", "manifest_sha256": digest}
    with _partial_file(output, settings) as (file, answers):
        if on_progress:
            on_progress(len(answers), len(examples))
        bad: dict[tuple[Path, str], list[str]] = {}
        for clip, result in _ask(teacher, [example for example in examples if example.id not in answers]):
            for example, answer in zip(clip, result, strict=True):
                if isinstance(answer, UnusableVideoError):
                    bad.setdefault((example.video_path, str(answer)), []).append(example.id)
                else:
                    answers[example.id] = answer
                    file.write(_line({"id": example.id, **asdict(answer)}))
            file.flush()
            if on_progress:
                on_progress(len(answers) + sum(map(len, bad.values())), len(examples))
        done = [_answered(example, answers[example.id], teacher) for example in examples if example.id in answers]
        write_manifest(output, done)
    return done, [Rejection(video, tuple(ids), reason) for (video, reason), ids in bad.items()]


def partial_path(output: Path) -> Path:
    """Where answers are collected."""
    return output.with_name(f"{output.name}.partial")


_Result = Sequence[TeacherAnswer | UnusableVideoError]


def _ask(teacher: Teacher, examples: Sequence[Example]) -> Iterator[tuple[list[Example], _Result]]:
    """The examples of each clip with their answers, in the order in which the answers arrive."""
    clips: dict[Any, list[Example]] = {}
    for example in examples:
        clips.setdefault((example.video_path, example.span), []).append(example)

    def answer(clip: list[Example]) -> _Result:
        try:
            answers = teacher.answer(clip)
        except UnusableVideoError as error:
            return [error] * len(clip)
        return [one if one.text else UnusableVideoError(NO_ANSWER, "The teacher says nothing.") for one in answers]

    pool = ThreadPoolExecutor(teacher.concurrency)
    try:
        waiting = {pool.submit(answer, clip): clip for clip in clips.values()}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _answered(example: Example, answer: TeacherAnswer, teacher: Teacher) -> Example:
    original = example.metadata.get(ORIGINAL, example.target_text)
    told = {TEACHER: {**teacher.settings, "finish_reason": answer.finish_reason}, ORIGINAL: original}
    return replace(example, target_text=answer.text, metadata={**example.metadata, **told})


@contextmanager
def _partial_file(output: Path, settings: dict[str, Any]) -> Iterator[tuple[IO[bytes], dict[str, TeacherAnswer]]]:
    """The open file of answers, locked by this process, and the answers in it; the file is removed after success."""
    path = partial_path(output)
    if output.exists() and not path.exists():
        raise ValueError(f"{output} exists already; name another file, or delete it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            # The file of answers itself: a lock file beside it would stay when the answers are complete.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{path} is being written by another process; let it end, or name another file."
            ) from error
        answers = _read_answers(file, path, settings)
        yield file, answers
        path.unlink()


def _read_answers(file: IO[bytes], path: Path, settings: dict[str, Any]) -> dict[str, TeacherAnswer]:
    """The answers that an earlier run wrote; an unfinished last line is cut off."""
    file.seek(0)
    lines: list[dict[str, Any]] = []
    good = 0
    for line in file:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if row is None:
            break
        lines.append(row)
        good += len(line)
    file.truncate(good)
    if not lines:
        file.write(_line({"settings": settings}))
        file.flush()
        return {}
    begun = lines[0].get("settings", {})
    if begun != settings:
        changed = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
        told = ", ".join(f"{name} {begun.get(name)!r}, now {settings.get(name)!r}" for name in changed)
        raise ValueError(f"{path} was begun with other settings ({told}); go on with those, or delete it.")
    return {row.pop("id"): TeacherAnswer(**row) for row in lines[1:]}


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
