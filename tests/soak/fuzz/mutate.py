"""Inputs from inputs: values, kinds, keys, depth and texts of JSON; headers, paths and bytes of everything."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from random import Random
from typing import Any
from urllib.parse import quote

from tests.soak.fuzz.seeds import FIELDS, HEADERS, ODD
from tests.soak.fuzz.wire import Input

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "FOO"]
_SCHEMA_WORDS = [
    "$ref",
    "$defs",
    "anyOf",
    "allOf",
    "not",
    "pattern",
    "minItems",
    "maxLength",
    "items",
    "const",
    "format",
]
_BYTES = [
    b"\x00",
    b"\xff",
    b"\r\n",
    b"{",
    b"[",
    b'"',
    b"\\ud800",
    b"1e999",
    b"NaN",
    b"--b\r\n",
    b"filename*=UTF-8''x",
]


def mutated(seed: Input, others: list[Input], chance: Random) -> Input:
    """The seed with one to four changes."""
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        change = chance.choices((_json, _bytes, _header, _path, _method), (70, 8, 10, 10, 2))[0]
        seed = change(seed, others, chance)
    return seed


def _json(seed: Input, others: list[Input], chance: Random) -> Input:
    try:
        tree = json.loads(seed.body)
    except (ValueError, RecursionError):
        return _bytes(seed, others, chance)
    holder: dict[str, Any] = {"": tree}
    place, key = chance.choice([*_places(holder)])
    match chance.randrange(8):
        case 0 | 1:
            place[key] = copy.deepcopy(chance.choice(ODD))
        case 2:
            del place[key]
        case 3:
            target = place[key] if isinstance(place[key], dict) else place
            if isinstance(target, dict):
                target[chance.choice(FIELDS + _SCHEMA_WORDS)] = copy.deepcopy(chance.choice(ODD))
        case 4:
            for _ in range(chance.choice((1, 2, 70, 330))):
                place[key] = [place[key]] if chance.random() < 0.5 else {"items": place[key]}
        case 5:
            place[key] = [copy.deepcopy(place[key])] * chance.choice((2, 50, 3000))
        case 6 if isinstance(place, dict):
            place[chance.choice(FIELDS)] = place.pop(key)
        case _:
            other = chance.choice(others)
            try:
                place[key] = chance.choice([*_places({"": json.loads(other.body)})])[0]
            except (ValueError, RecursionError):
                place[key] = str(place[key])[:100]
    try:
        return seed.with_body(json.dumps(holder.get("", holder)).encode())
    except (ValueError, RecursionError):
        return seed


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found, left = [], [tree]
    while left:
        node = left.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], dict | list):
                left.append(node[key])
    return found


def _bytes(seed: Input, _others: list[Input], chance: Random) -> Input:
    body = bytearray(seed.body)
    at = chance.randrange(len(body) + 1)
    match chance.randrange(4):
        case 0 if body:
            body[min(at, len(body) - 1)] ^= 1 << chance.randrange(8)
        case 1:
            del body[at:]
        case 2:
            body[at:at] = chance.choice(_BYTES)
        case _:
            body[at : at + 20] = b""
    return seed.with_body(bytes(body))


def _header(seed: Input, _others: list[Input], chance: Random) -> Input:
    name, value = chance.choice(HEADERS)
    return replace(seed, headers={**seed.headers, name: value})


def _path(seed: Input, _others: list[Input], chance: Random) -> Input:
    odd = chance.choice(ODD)
    text = quote(str(odd)[:3000], safe="/%", errors="replace") or "%EF%BC%91"
    match chance.randrange(4):
        case 0:
            return replace(seed, path=f"{seed.path}/{text}")
        case 1:
            return replace(seed, path=f"{seed.path}{'&' if '?' in seed.path else '?'}{chance.choice(FIELDS)}={text}")
        case 2 if "=" in seed.path:
            return replace(seed, path=f"{seed.path.split('=')[0]}={text}")
        case _:
            parts = seed.path.split("/")
            parts[chance.randrange(1, len(parts))] = text
            return replace(seed, path="/".join(parts))


def _method(seed: Input, _others: list[Input], chance: Random) -> Input:
    return replace(seed, method=chance.choice(_METHODS))
