"""What an answer to any input may be."""

from __future__ import annotations

import re

from tests.soak.fuzz.wire import Answer, Input

# A server may say that it cannot now, if it says when to come back.
_LATER = [
    "queue_full",
    "engine_busy",
    "adapter_unavailable",
    "too_many_videos_in_use",
    "catalog_busy",
    "too_many_bytes",
]
_LEAKS = re.compile(
    r"""Traceback \(most|File \\?"/|site-packages|<class '|\bat 0x[0-9a-f]{6,}"""
    r"""|(?<![\w./])/(?:work|tmp|root|home|usr|opt|var|proc|dev/shm)/[\w.-]+"""
    r"""|\b(?:Type|Key|Attribute|Runtime|Index|Assertion|Recursion|Overflow|Unicode\w*)Error\b"""
    r"""|object has no attribute|object is not (?:iterable|subscriptable|callable)|codec can't"""
    r"""|could not convert string|invalid literal for|too large to convert|NoneType"""
)


def fault(given: Input, answer: Answer) -> str | None:
    """What is wrong with an answer: `crash`, `hang`, `5xx` or `leak`; None for one that is in order."""
    if answer.status == -1:
        return "hang"
    if answer.status == 0:
        return "crash"
    if answer.status >= 500 and not _is_for_later(answer):
        return "5xx"
    if answer.status >= 400 and (leak := _LEAKS.search(answer.body)):
        sent = given.path.encode("utf-8", "replace") + given.body
        if leak[0].encode() not in sent:
            return "leak"
    return None


def _is_for_later(answer: Answer) -> bool:
    return "retry-after:" in answer.headers.lower() and any(f'"{code}"' in answer.body for code in _LATER)
