"""A language model as judge of answers, behind any OpenAI-compatible endpoint.

Scores are whole numbers from 0 to 5; a rubric, a file of `rubrics/`, is all the judge is told. Judgements are kept on
disk under a hash of everything that shapes them, so that nothing is judged twice. A reply without a score is asked for
again, then reported: it never becomes a number.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from openai import AsyncOpenAI

from f2l_vllm.evaluation.answers import AnswerRecord
from f2l_vllm.evaluation.rubrics import ANSWER, RUBRICS, SCALE
from f2l_vllm.evaluation.server import together
from f2l_vllm.files import write_whole

_ATTEMPTS = 3


@dataclass(frozen=True)
class Judgement:
    """A judge's score of one answer; `score` is None when no reply held one, and `reply` is the last reply."""

    score: int | None
    reply: str


class Judge:
    """Scores answers through `/chat/completions`.

    Args:
        base_url: of the endpoint; ends in `/v1` for most.
        model: its name there.
        api_key: sent with every request.
        cache: folder in which judgements are kept.
        concurrency: requests at a time.
        rubric: one of `RUBRICS`.
    """

    def __init__(
        self, base_url: str, model: str, api_key: str, cache: Path, concurrency: int = 8, rubric: str = ANSWER
    ) -> None:
        self._url, self._model, self._key = base_url, model, api_key
        self._cache, self._concurrency = cache, concurrency
        self._rubric = RUBRICS[rubric]
        self._prompt = Template(self._rubric.text)

    def configuration(self) -> dict[str, Any]:
        """What the judge's scores depend on, and their scale."""
        digest = hashlib.sha256(self._prompt.template.encode()).hexdigest()
        return {
            "model": self._model,
            "base_url": self._url,
            "rubric": self._rubric.name,
            "prompt_sha256": digest,
            "scale": list(SCALE),
        }

    def score(
        self, answers: Sequence[AnswerRecord], on_progress: Callable[[int, int], None] | None = None
    ) -> dict[tuple[str, str], Judgement]:
        """Judge answers; returns their keys -> judgements. Equal answers to equal questions are judged once.

        Raises:
            openai.APIError: the endpoint cannot be reached, or refuses; the judgements so far are kept.
        """
        prompts = {answer.key: self._text(answer) for answer in answers}
        distinct = list(dict.fromkeys(prompts.values()))
        judged: dict[str, Judgement] = {}

        async def work() -> None:
            slots = asyncio.Semaphore(self._concurrency)
            async with AsyncOpenAI(base_url=self._url, api_key=self._key, max_retries=4, timeout=600) as client:

                async def one(prompt: str) -> None:
                    async with slots:
                        judged[prompt] = await self._judge(client, prompt)
                    if on_progress:
                        on_progress(len(judged), len(distinct))

                await together(one(prompt) for prompt in distinct)

        asyncio.run(work())
        return {key: judged[prompt] for key, prompt in prompts.items()}

    def _text(self, answer: AnswerRecord) -> str:
        return self._prompt.substitute(question=answer.question, truth=answer.truth, answer=answer.answer)

    async def _judge(self, client: AsyncOpenAI, prompt: str) -> Judgement:
        kept = self._file(prompt)
        if kept.exists():
            return Judgement(**json.loads(kept.read_text(encoding="utf-8")))
        messages: list[Any] = [{"role": "user", "content": prompt}]
        reply = ""
        for _ in range(_ATTEMPTS):
            completion = await client.chat.completions.create(
                model=self._model, messages=messages, temperature=0, max_tokens=self._rubric.max_tokens
            )
            reply = completion.choices[0].message.content or ""
            score = parse_score(reply, self._rubric.field)
            if score is not None:
                judgement = Judgement(score, reply)
                write_whole(kept, json.dumps(asdict(judgement)) + "\n")
                return judgement
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": _reminder(self._rubric.field)},
            ]
        return Judgement(None, reply)

    def _file(self, prompt: str) -> Path:
        digest = hashlib.sha256(json.dumps([self._url, self._model, prompt]).encode()).hexdigest()
        return self._cache / digest[:2] / f"{digest}.json"


def parse_score(reply: str, field: str = "score") -> int | None:
    """The last score that a reply gives as JSON in this field; None if it gives none, or one that is off the scale."""
    found = re.findall(rf'"{re.escape(field)}"\s*:\s*(-?\d+(?:\.\d+)?)\s*[,}}]', reply)
    score = float(found[-1]) if found else -1.0
    return int(score) if score.is_integer() and SCALE[0] <= score <= SCALE[1] else None


def _reminder(field: str) -> str:
    return f'That holds no score. Reply with {{"{field}": N}} alone, N a whole number from 0 to 5.'
