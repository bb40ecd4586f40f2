"""Which question is asked when: video-question pairs with given popularity and arrivals, the same for every arm."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from f2l_vllm.client import Answer
from f2l_vllm.evaluation.server import together

Popularity = Literal["uniform", "zipf"]


@dataclass(frozen=True)
class Request:
    """Question `question` about video `video`, both counted from 0, `at` seconds after the beginning or, if askers wait
    for answers, when an asker is free."""

    at: float
    video: int
    question: int


def make(
    requests: int,
    videos: int,
    questions: int,
    popularity: Popularity,
    zipf_alpha: float,
    request_rate: float | None,
    seed: int,
) -> list[Request]:
    """A trace; the same arguments give the same trace, and a longer trace begins with the shorter one.

    Args:
        popularity: `zipf`: video n, counted from 0, is asked about in proportion to 1 / (n + 1) ** zipf_alpha.
        request_rate: questions a second, at exponential distances; None: all at once, for askers that wait.
    """
    weights = [1.0 if popularity == "uniform" else (place + 1) ** -zipf_alpha for place in range(videos)]
    which, what, when = (random.Random(f"{seed} {part}") for part in ("video", "question", "arrival"))
    at = 0.0
    trace = []
    for _ in range(requests):
        if request_rate is not None:
            at += when.expovariate(request_rate)
        trace.append(Request(at, which.choices(range(videos), weights)[0], what.randrange(questions)))
    return trace


async def replay(
    trace: Sequence[Request], ask: Callable[[Request, float | None], Awaitable[Answer | None]], concurrency: int
) -> tuple[list[Answer], float]:
    """Ask everything in order, no question before its time, at most `concurrency` at a time.

    Args:
        ask: takes a request and its time of arrival. If all askers were busy, that is before the request is sent: the
            wait counts as part of the answer's time. None if askers wait for answers. It returns None for a question
            that failed, which is left out.

    Returns:
        the answers in the order of the trace, and the seconds from the first question to the last answer.
    """
    answers: list[Answer | None] = [None] * len(trace)
    waiting = iter(enumerate(trace))
    started = time.perf_counter()

    async def asker() -> None:
        for place, request in waiting:
            arrived = started + request.at if request.at else None
            if arrived is not None:
                await asyncio.sleep(max(0.0, arrived - time.perf_counter()))
            answers[place] = await ask(request, arrived)

    await together(asker() for _ in range(min(concurrency, len(trace))))
    seconds = time.perf_counter() - started
    return [answer for answer in answers if answer is not None], seconds
