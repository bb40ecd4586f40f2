"""Checks what a JSON body holds before anything else reads it, so that every handler can rely on it.

JSON lets a client write what no handler expects: numbers beyond every range, halves of characters, nesting that
overflows a parser's stack, millions of values in a few megabytes.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from f2l_vllm.server.errors import APIError, bad_request

MAX_DEPTH = 100  # of nested objects and arrays; vLLM accepts JSON schemas of 64
MAX_VALUES = 1 << 18  # in objects and arrays together: two prompts of 128 Ki token ids
_INTEGERS = range(-(1 << 63), 1 << 64)  # what can be sent to the engine


def parse(body: bytes) -> Any:
    """The value of a JSON body.

    Raises:
        APIError: `invalid_json`: no JSON in UTF-8, or a number or character that does not exist; `request_too_complex`.
    """
    # Commas and brackets in strings count too, but no question short enough for a model has this many.
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise _too_complex(f"{MAX_VALUES:,} values (commas and brackets)")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8 (at byte {error.start})") from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise too_deep() from error
    except ValueError as error:  # thousands of digits
        raise _invalid("it holds a number with more digits than any number has here") from error
    check(value)
    return value


def too_deep() -> APIError:
    """400: objects and arrays nested deeper than `MAX_DEPTH`."""
    return _too_complex(f"{MAX_DEPTH} levels of nesting")


def check(value: Any) -> None:
    """Check a value that was parsed from JSON.

    Raises:
        APIError: as `parse`.
    """
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise too_deep()
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise _invalid("it holds a number that is too large for a double")
            elif isinstance(item, int) and item not in _INTEGERS:
                raise _invalid("it holds a whole number of more than 64 bits")
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise _invalid("a string in it holds half of a surrogate pair, which is no character") from error


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid(f"{name} is no JSON number")


def _invalid(why: str) -> APIError:
    return bad_request("invalid_json", f"The request's body cannot be read as JSON: {why}.")


def _too_complex(cap: str) -> APIError:
    return bad_request("request_too_complex", f"The request's body has more than {cap}: send several requests.")
