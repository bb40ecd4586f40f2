"""Constraints are tried in a process of their own, within limits, before the engine is given one."""

import asyncio
import gc
import json
import os
import struct
import time
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest

from f2l_vllm.grammar_limits import GrammarLimits
from f2l_vllm.models import resolve
from f2l_vllm.server import vllm_grammars
from f2l_vllm.server.chat import grammar_child
from f2l_vllm.server.chat.constraints import Constraint
from f2l_vllm.server.chat.grammars import Grammars
from f2l_vllm.server.errors import APIError

FINE = {
    "a schema": ("json", json.dumps({"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}})),
    "a regex": ("regex", "(red|blue)+"),
    "a grammar": ("grammar", 'root ::= "yes" | "no"'),
    "a grammar in Lark": ("grammar", 'start: "yes" | "no"'),
    "choices": ("choice", '["yes", "no\\n\\"quoted\\""]'),
    "recursion": ("grammar", 'root ::= "(" root ")" | "x"'),
    "a structural tag": ("structural_tag", json.dumps({"type": "structural_tag", "format": {"type": "any_text"}})),
}
BROKEN = {
    "a regex of Unicode classes": ("regex", r"\p{L}+"),
    "a regex that is cut": ("regex", "((("),
    "a grammar of nothing but itself": ("grammar", "root ::= root"),
    "a loop of references": ("json", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
    "a reference to nothing": ("json", '{"$ref": "#/nowhere"}'),
    "no JSON": ("json", "{"),
    "no grammar": ("grammar", "::="),
    "a tag of nothing": (
        "structural_tag",
        '{"structures": [{"begin": "", "end": "", "schema": null}], "triggers": [""]}',
    ),
    "a tag without its parts": ("structural_tag", '{"structures": [{}], "triggers": []}'),
    "a tag whose parts are no list": ("structural_tag", '{"structures": 3, "triggers": []}'),
    "a tag that is a list": ("structural_tag", "[1]"),
    "a tag of no kind": ("structural_tag", '{"type": "structural_tag", "format": {"type": "nothing"}}'),
}  # fmt: skip
SLOW = {
    "repetition in repetition": ("regex", "((a{1,100}){1,100}){1,100}"),
    "ambiguity": ("grammar", 'root ::= root root root | "a" | ""'),
    "ambiguity that shows late": ("grammar", 'root ::= root root | "a" | ""'),
    "ambiguity in brackets": ("grammar", 'root ::= root root | "(" root ")" | [a-z] | ""'),
}


@asynccontextmanager
async def trying(seconds=5.0):
    from vllm.tokenizers import get_tokenizer

    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 896))
    tokenizer = get_tokenizer(str(resolve("f2l-tiny")))
    engine = SimpleNamespace(vllm_config=config, renderer=SimpleNamespace(get_tokenizer=lambda: tokenizer))
    grammars = Grammars(vllm_grammars.vocabulary(engine), vllm_grammars.language, GrammarLimits(seconds))
    try:
        yield grammars
    finally:
        await grammars.close()


async def refused(grammars, kind, text, tenant="t"):
    try:
        await grammars.check(Constraint(kind, text), tenant)
    except APIError as refusal:
        leaks = ("project/cpp", "pydantic", "object is not", "input_value", "KeyError")
        return refusal.code if refusal.status == 400 and not any(one in refusal.message for one in leaks) else refusal
    return None


def children(process):
    return open(f"/proc/{process}/task/{process}/children").read().split()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_what_is_tried_and_refused_and_nothing_of_the_trying_process_is_left_to_the_garbage_collector():
    async def run():
        async with trying() as grammars:
            seen = {name: await refused(grammars, *given) for name, given in (FINE | BROKEN | SLOW).items()}
            for code, names in (
                (None, FINE),
                ("invalid_structured_output", BROKEN),
                ("structured_output_too_complex", SLOW),
            ):
                assert {name: seen[name] for name in names} == dict.fromkeys(names, code)
            started = time.monotonic()
            assert await refused(grammars, *SLOW["ambiguity"]) == "structured_output_too_complex"
            assert time.monotonic() - started < 2.5  # it is remembered: a trial takes 5
            process = grammars._process
        assert process.returncode is not None

    asyncio.run(run())
    gc.collect()  # what is left would be closed without a loop


def test_one_tenants_constraints_hold_up_nobody_elses_and_end_with_their_request():
    async def run():
        async with trying(seconds=60) as grammars:
            assert await refused(grammars, *FINE["a regex"]) is None  # started
            process = grammars._process.pid
            endless = [("json", json.dumps({"enum": [f"{i}x{j}" * 9 for j in range(1999)], "n": i})) for i in range(4)]
            slow = [asyncio.create_task(refused(grammars, *given, "attacker")) for given in endless]
            while not children(process):
                await asyncio.sleep(0.005)
            assert len(children(process)) == 1  # a tenant's are tried one after the other
            assert await refused(grammars, *FINE["a grammar"], "other") is None
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
            deadline = time.monotonic() + 5
            while children(process):
                assert time.monotonic() < deadline, "a trial goes on without its request"
                await asyncio.sleep(0.01)
            os.kill(process, 9)
            await asyncio.sleep(0.5)
            assert await refused(grammars, *BROKEN["no grammar"]) == "invalid_structured_output"  # by another process

    asyncio.run(run())


def test_a_trial_ends_at_its_limit():
    async def run():
        async with trying(seconds=0.01) as grammars:
            big = json.dumps({"type": "object", "properties": {f"p{i}": {"enum": [i, str(i)]} for i in range(900)}})
            started = time.monotonic()
            return await refused(grammars, "json", big), time.monotonic() - started

    code, seconds = asyncio.run(run())
    assert code in (None, "structured_output_too_complex")
    assert seconds < 60


@pytest.mark.parametrize("value", [0, -1])
def test_limits_are_positive(value):
    with pytest.raises(ValueError, match="positive"):
        GrammarLimits(seconds=value)


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0", struct.pack("!i", 100) + b"{"], ids=["nothing", "half a size", "half a message"]
)
def test_a_parent_that_is_killed_while_it_sends_ends_the_trying(sent):
    reading, writing = os.pipe()
    os.write(writing, sent)
    os.close(writing)
    with Connection(reading, writable=False) as requests:
        assert grammar_child._read(requests) is None
