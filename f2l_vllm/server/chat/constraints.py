"""Constraints that a request may put on its answer (schema, regex, grammar, choice, structural tag), and size caps.

The engine compiles each into an automaton over the vocabulary, which can take minutes for a few kilobytes. This module
refuses constraints by their size alone; `grammars` compiles the remaining ones on trial.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from f2l_vllm.server.errors import APIError, bad_request

Kind = Literal["json", "regex", "choice", "grammar", "structural_tag"]
MAX_BYTES: dict[Kind, int] = {
    "json": 1 << 17,
    "regex": 1 << 12,
    "choice": 1 << 16,
    "grammar": 1 << 16,
    "structural_tag": 1 << 17,
}
MAX_PROPERTIES = 1000  # in all schemas of a request together
MAX_VALUES = 2000  # in its enums and alternatives together; also of choices
MAX_COUNT = 100_000  # minItems, maxLength and the like
MAX_DEPTH = 80  # vLLM accepts 64 levels of schema, inside 16 levels of a structural tag
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_ALTERNATIVES = ("enum", "anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")


@dataclass(frozen=True)
class Constraint:
    """One constraint, as text: a JSON schema or structural tag as JSON, choices as a JSON list."""

    kind: Kind
    text: str


def constraints(body: Any) -> list[Constraint]:
    """The constraints in the body of a generating route, after a check of their sizes.

    Constraints in a form that vLLM does not accept are left out, because vLLM refuses them.

    Raises:
        APIError: `structured_output_too_complex`.
    """
    if not isinstance(body, dict):
        return []
    found = [*_structured_outputs(body.get("structured_outputs")), *_response_format(body.get("response_format"))]
    for outer in ("text", "output_config"):  # of the Responses API, and of Anthropic's
        if isinstance(given := body.get(outer), dict):
            found += _schema_format(given.get("format"))
    found += _schema_format(body.get("output_format"))
    if isinstance(tools := body.get("tools"), list | dict):  # compiled only if a tool parser is set
        check(Constraint("json", json.dumps(tools)))
    for constraint in found:
        check(constraint)
    return found


def _structured_outputs(given: Any) -> Iterator[Constraint]:
    if not isinstance(given, dict):
        return
    for kind in MAX_BYTES:
        value = given.get(kind)
        if kind in ("json", "choice") and isinstance(value, dict | list):
            yield Constraint(kind, json.dumps(value))
        elif isinstance(value, str) and kind != "choice":
            yield Constraint(kind, value)


def _response_format(given: Any) -> Iterator[Constraint]:
    if not isinstance(given, dict):
        return
    if given.get("type") == "structural_tag":
        yield Constraint("structural_tag", json.dumps(given))
    elif isinstance(inner := given.get("json_schema"), dict) and isinstance(inner.get("schema"), dict):
        yield Constraint("json", json.dumps(inner["schema"]))


def _schema_format(given: Any) -> list[Constraint]:
    if isinstance(given, dict) and isinstance(given.get("schema"), dict):
        return [Constraint("json", json.dumps(given["schema"]))]
    return []


def check(constraint: Constraint) -> None:
    """Refuse a constraint that is too large to try.

    Raises:
        APIError: `structured_output_too_complex`.
    """
    cap = MAX_BYTES[constraint.kind]
    if len(constraint.text) > cap:
        raise too_complex(f"it is longer than {cap:,} characters")
    if constraint.kind in ("json", "choice", "structural_tag"):
        try:
            _check_size(json.loads(constraint.text))
        except (ValueError, RecursionError):
            return  # not JSON: vLLM reports it


def _check_size(schema: Any) -> None:
    properties = alternatives = depth = 0
    level = [schema]
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, list):
                below += item
            elif isinstance(item, dict):
                below += item.values()
                properties += sum(len(named) for key in _NAMED if isinstance(named := item.get(key), dict))
                alternatives += sum(len(some) for key in _ALTERNATIVES if isinstance(some := item.get(key), list))
                if any(isinstance(n := item.get(key), int | float) and n > MAX_COUNT for key in _COUNTS):
                    raise too_complex(f"it counts to more than {MAX_COUNT:,}")
        level, depth = below, depth + 1
        if depth > MAX_DEPTH:
            raise too_complex(f"it is nested in more than {MAX_DEPTH} levels")
    if isinstance(schema, list):
        alternatives += len(schema)
    if properties > MAX_PROPERTIES:
        raise too_complex(f"it names more than {MAX_PROPERTIES:,} properties")
    if alternatives > MAX_VALUES:
        raise too_complex(f"it lists more than {MAX_VALUES:,} values or alternatives")


def too_complex(why: str) -> APIError:
    """400: the constraint would cost the server more than one request may."""
    message = f"The answer's constraint (schema, grammar, regex, choices) is too complex: {why}. Make it smaller."
    return bad_request("structured_output_too_complex", message, "structured_outputs")


def invalid(why: str) -> APIError:
    """400: nothing can be generated under this constraint."""
    message = f"The answer's constraint (schema, grammar, regex, choices) cannot be used: {why}."
    return bad_request("invalid_structured_output", message, "structured_outputs")
