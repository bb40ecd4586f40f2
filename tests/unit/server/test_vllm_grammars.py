"""What this package leans on of vLLM's constraints and errors: another version fails here first."""

import asyncio
import inspect
import json
from types import SimpleNamespace

import pytest

from f2l_vllm.engine import grammar_patches
from f2l_vllm.server import vllm_errors, vllm_grammars
from f2l_vllm.server.chat.constraints import Constraint
from f2l_vllm.server.errors import APIError
from tests.support import source_of

CHANGED = "vLLM {}; the installed version does not: see docs/patches.md"


def test_what_reaches_the_engine_is_read_of_the_sampling_parameters():
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    for given, kind, text in (
        ({"json": {"type": "object"}}, "json", '{"type": "object"}'),
        ({"json": "{}"}, "json", "{}"),
        ({"regex": "a"}, "regex", "a"),
        ({"choice": ["a"]}, "choice", '["a"]'),
        ({"grammar": "root ::= x"}, "grammar", "root ::= x"),
        ({"structural_tag": "{}"}, "structural_tag", "{}"),
    ):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**given))
        assert vllm_grammars.constraint_of(params) == Constraint(kind, text), CHANGED.format("keeps constraints there")
    known = {"json", "regex", "choice", "grammar", "json_object", "structural_tag"}
    options = {"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
    fields = {name for name in StructuredOutputsParams.__dataclass_fields__ if not name.startswith("_")}
    assert fields == known | options, CHANGED.format("has these constraints and no other")
    assert vllm_grammars.constraint_of(SamplingParams()) is None


def engine(outputs=(), error=None, backend="auto"):
    async def generate(prompt, sampling_params, request_id):
        for output in outputs:
            yield output
        if error is not None:
            raise error

    config = SimpleNamespace(backend=backend)
    return SimpleNamespace(
        generate=generate, vllm_config=SimpleNamespace(structured_outputs_config=config, model_config=None)
    )


async def everything(stream):
    return [output async for output in stream]


def test_a_constraint_is_tried_before_the_engine_gets_it():
    from vllm.sampling_params import StructuredOutputsParams

    params = SimpleNamespace(structured_outputs=StructuredOutputsParams(regex="a"))
    seen = []

    async def check(constraint, tenant):
        seen.append(constraint)
        if len(seen) > 1:
            raise APIError(400, "structured_output_too_complex", "no")

    client = engine([1, 2])
    vllm_grammars.try_before_generating(client, check)
    assert asyncio.run(everything(client.generate("x", params, "id"))) == [1, 2]
    with pytest.raises(APIError):
        asyncio.run(everything(client.generate("x", params, "id")))
    assert seen == [Constraint("regex", "a")] * 2


def test_an_answer_that_its_constraint_ended_is_not_the_servers_fault():
    from vllm.exceptions import GenerationError
    from vllm.sampling_params import StructuredOutputsParams

    async def check(constraint, tenant):
        return None

    for constraint, code in ((StructuredOutputsParams(json_object=True), "structured_output_failed"), (None, None)):
        client = engine(error=GenerationError())
        vllm_grammars.try_before_generating(client, check)
        params = SimpleNamespace(structured_outputs=constraint)
        with pytest.raises(GenerationError) as error:
            asyncio.run(everything(client.generate("x", params, "id")))
        refused = vllm_errors.refusal(error.value, {"type": "http", "path": "/"})
        assert (None if refused is None else refused.code) == code


@pytest.mark.parametrize(("backend", "bounded"), [("auto", True), ("xgrammar", True), ("guidance", False)])
def test_no_request_chooses_the_backend_for_all(backend, bounded):
    client = engine(backend=backend)
    assert vllm_grammars.use_xgrammar(client) is bounded
    assert client.vllm_config.structured_outputs_config.backend != "auto"


def test_vllm_has_what_is_replaced_in_the_engine():
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

    grammar_patches.install()
    source = inspect.getsource(inspect.unwrap(StructuredOutputManager.grammar_init))
    assert "self.executor.submit(self._create_grammar, request)" in source, CHANGED.format("compiles in an executor")
    assert "self.matcher.accept_token" in inspect.getsource(inspect.unwrap(XgrammarGrammar.accept_tokens))
    assert "num_processed_tokens" in XgrammarGrammar.__dataclass_fields__
    source = source_of(XgrammarBackend)
    for call in ("compile_json_schema", "compile_lark", "compile_grammar", "compile_regex", "compile_structural_tag"):
        assert call in source, CHANGED.format("compiles as grammar_child.py does")


def test_an_answer_that_is_slow_to_match_is_given_up_in_the_engine():
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    grammar_patches.install()
    matcher = SimpleNamespace(accept_token=lambda token: True, is_terminated=lambda: False)
    grammar = XgrammarGrammar(vocab_size=1, matcher=matcher, ctx=None)
    assert grammar.accept_tokens("fast", [1])
    grammar._f2l_seconds = 10.0
    assert not grammar.accept_tokens("slow", [1])


def test_choices_and_lark_are_told_from_grammars():
    assert vllm_grammars.language(Constraint("choice", json.dumps(["a", 'b"']))) == (
        "grammar",
        'root ::= "a" | "b\\""',
    )
    assert vllm_grammars.language(Constraint("grammar", 'start: "a"'))[0] == "lark"
    assert vllm_grammars.language(Constraint("grammar", 'root ::= "a"'))[0] == "grammar"
