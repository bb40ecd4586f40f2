"""Constraints are found wherever the APIs take one, and refused by their size."""

import json

import pytest

from f2l_vllm.server.chat.constraints import Constraint, constraints
from f2l_vllm.server.errors import APIError

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def places(schema):
    """Every way to hand in a JSON schema."""
    return {
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        "structured_outputs": {"structured_outputs": {"json": schema}},
        "structured_outputs as text": {"structured_outputs": {"json": json.dumps(schema)}},
        "responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
        "messages": {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    }


@pytest.mark.parametrize("place", places(SCHEMA))
def test_a_schema_is_found_in_every_api(place):
    (found,) = constraints(places(SCHEMA)[place])
    assert (found.kind, json.loads(found.text)) == ("json", SCHEMA)


def test_the_other_kinds_are_found():
    assert constraints({"structured_outputs": {"regex": "a+"}}) == [Constraint("regex", "a+")]
    assert constraints({"structured_outputs": {"choice": ["a", "b"]}}) == [Constraint("choice", '["a", "b"]')]
    assert constraints({"structured_outputs": {"grammar": "root ::= x"}}) == [Constraint("grammar", "root ::= x")]
    tag = {"type": "structural_tag", "format": {"type": "any_text"}}
    assert constraints({"response_format": tag})[0].kind == "structural_tag"
    assert constraints({"structured_outputs": {"structural_tag": json.dumps(tag)}})[0].kind == "structural_tag"


@pytest.mark.parametrize(
    "body", [None, [], {"response_format": 5}, {"response_format": {"type": "json_object"}}, {"text": {"format": 1}},
             {"structured_outputs": {"json": 5, "choice": 5, "regex": 5}}, {"tools": "x"}]
)  # fmt: skip
def test_no_constraint_is_found_where_there_is_none(body):
    assert constraints(body) == []


def deep(levels):
    schema: dict = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


TOO_LARGE = {
    "8,000 properties": {"properties": {f"p{i}": {} for i in range(8000)}},
    "as many in nested objects": {"items": [{"properties": {f"b{j}": {} for j in range(99)}} for i in range(99)]},
    "20,000 definitions": {"$defs": {f"p{i}": {} for i in range(20000)}},
    "an enum of 50,000": {"enum": list(range(50_000))},
    "an anyOf of 5,000": {"anyOf": [{}] * 5000},
    "a string of ten million": {"type": "string", "maxLength": 10**7},
    "an array of ten million": {"type": "array", "minItems": 1e7},
    "90 levels": deep(90),
    "a pattern of a megabyte": {"type": "string", "pattern": "a" * (1 << 20)},
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_LARGE)
@pytest.mark.parametrize("place", [*places(SCHEMA), "a tool"])
def test_too_large_a_schema_is_refused_in_every_place(what, place):
    tool = {"tools": [{"type": "function", "function": {"name": "f", "parameters": TOO_LARGE[what]}}]}
    with pytest.raises(APIError) as error:
        constraints(places(TOO_LARGE[what]).get(place, tool))
    assert (error.value.status, error.value.code) == (400, "structured_output_too_complex")


@pytest.mark.parametrize(
    "given", [{"regex": "(a|b)" * 10_000}, {"grammar": 'root ::= "a"\n' * 10_000}, {"choice": ["x"] * 10_000}]
)
def test_too_large_a_regex_grammar_or_choice_is_refused(given):
    with pytest.raises(APIError) as error:
        constraints({"structured_outputs": given})
    assert error.value.code == "structured_output_too_complex"
