"""Where this package leans on how vLLM 0.32 constrains answers: what reaches the engine, and what it may cost there.

`tests/serving/test_compat_grammars.py` holds a contract test for each touch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from f2l_vllm.grammar_limits import matching_seconds
from f2l_vllm.serving import compat_errors
from f2l_vllm.serving.constraints import Constraint
from f2l_vllm.serving.errors import APIError, bad_request
from f2l_vllm.serving.tenants import asking_tenant

logger = logging.getLogger(__name__)

_COMPILERS = 2  # threads in the engine, so that one constraint does not wait for another
_PATIENCE = 2.0  # the engine's clock counts what other processes take of its core, a trial's does not


def vocabulary(engine_client: Any) -> Callable[[], str]:
    """A function that gives the tokenizer's vocabulary to xgrammar as `XgrammarBackend.__post_init__` does."""

    def write() -> str:
        import xgrammar

        size = engine_client.vllm_config.model_config.get_vocab_size()
        tokenizer = engine_client.renderer.get_tokenizer()
        text: str = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size).serialize_json()
        return text

    return write


def language(constraint: Constraint) -> tuple[str, str]:
    """What a constraint is compiled as, and its text: vLLM tells Lark from EBNF, and makes a grammar of choices."""
    from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

    if constraint.kind == "choice":
        return "grammar", choice_as_grammar([str(choice) for choice in json.loads(constraint.text)])
    if constraint.kind == "grammar" and grammar_is_likely_lark(constraint.text):
        return "lark", constraint.text
    return constraint.kind, constraint.text


def constraint_of(params: Any) -> Constraint | None:
    """The constraint of vLLM's sampling parameters (`SamplingParams.structured_outputs`), but for any JSON object."""
    given = getattr(params, "structured_outputs", None)
    if given is None:
        return None
    if given.json is not None:
        return Constraint("json", given.json if isinstance(given.json, str) else json.dumps(given.json))
    if given.choice is not None:
        return Constraint("choice", json.dumps(given.choice))
    for kind in ("regex", "grammar", "structural_tag"):
        if (text := getattr(given, kind)) is not None:
            return Constraint(kind, text)
    return None


def use_xgrammar(engine_client: Any) -> bool:
    """Have every constraint compiled by xgrammar; False where the operator chose another backend.

    Under `auto` a constraint that xgrammar refuses goes to another backend, and whichever request comes first decides
    which one the engine has for good (`StructuredOutputManager.grammar_init`).
    """
    config = engine_client.vllm_config.structured_outputs_config
    if config.backend == "auto":
        config.backend = "xgrammar"
    return str(config.backend) == "xgrammar"


def try_before_generating(engine_client: Any, check: Callable[[Constraint, str], Awaitable[None]]) -> None:
    """Have `engine_client.generate` check every constraint before the engine gets it, wherever it comes from.

    Parameters that vLLM would refuse only when the answer is read, after a stream's first bytes, it refuses at once.
    """
    stock = engine_client.generate

    @functools.wraps(stock)
    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        if hasattr(sampling_params, "verify"):
            sampling_params.verify(engine_client.vllm_config.model_config, None, None, None)
        return answers(asking_tenant.get(), prompt, sampling_params, *args, **kwargs)

    async def answers(tenant: str, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import GenerationError

        constraint = constraint_of(sampling_params)
        if constraint is not None:
            await check(constraint, tenant)
        compat_errors.note_engine_asked()
        stream = stock(prompt, sampling_params, *args, **kwargs)
        try:
            async for output in stream:
                yield output
        except GenerationError as error:
            if getattr(sampling_params, "structured_outputs", None) is None:
                raise
            failure = _not_followed()
            error.args, error.status_code = (failure.message,), failure.status
            raise error from failure
        finally:
            await stream.aclose()

    engine_client.generate = generate


def _not_followed() -> APIError:
    return bad_request(
        "structured_output_failed",
        "The answer could not be brought to an end under its constraint: no token fits any more, or matching it takes "
        "too long. Change the schema, grammar or regex.",
        "structured_outputs",
    )


def install() -> None:
    """In the engine: compile beside its steps and at lower priority, and give up answers that are slow to match.

    Does nothing the second time.
    """
    from vllm.v1 import structured_output
    from vllm.v1.structured_output import backend_xgrammar

    manager: Any = structured_output.StructuredOutputManager
    grammar: Any = backend_xgrammar.XgrammarGrammar
    if manager.grammar_init.__module__ == __name__:
        return
    stock_init, stock_accept, stock_fill = manager.grammar_init, grammar.accept_tokens, grammar.fill_bitmask

    @functools.wraps(stock_init)
    def grammar_init(self: Any, request: Any) -> None:
        if not hasattr(self, "_f2l_executor") and getattr(self, "executor", None) is not None:
            self.executor.shutdown(wait=False)
            self.executor = self._f2l_executor = ThreadPoolExecutor(_COMPILERS, "grammar", initializer=_be_nice)
        params = request.structured_output_request
        if params is None or not params.params.json_object or self.backend is None:
            stock_init(self, request)
            return
        ready: Future[Any] = Future()
        params.grammar = ready  # compiled once, then taken from the compiler's cache
        try:
            ready.set_result(self._create_grammar(request))
        except Exception as error:
            ready.set_exception(error)

    @functools.wraps(stock_accept)
    def accept_tokens(self: Any, request_id: str, tokens: list[int]) -> bool:
        started = time.perf_counter()
        taken = stock_accept(self, request_id, tokens)
        self._f2l_seconds = getattr(self, "_f2l_seconds", 0.0) + time.perf_counter() - started
        if self._f2l_seconds > _PATIENCE * matching_seconds(self.num_processed_tokens):
            logger.warning("request %s is given up: its constraint takes too long to match", request_id)
            return False
        return bool(taken)

    @functools.wraps(stock_fill)
    def fill_bitmask(self: Any, bitmask: Any, index: int) -> None:
        started = time.perf_counter()
        stock_fill(self, bitmask, index)
        self._f2l_seconds = getattr(self, "_f2l_seconds", 0.0) + time.perf_counter() - started

    manager.grammar_init, grammar.accept_tokens, grammar.fill_bitmask = grammar_init, accept_tokens, fill_bitmask
    # The names above are what marks them as ours.
    for method in (grammar_init, accept_tokens, fill_bitmask):
        method.__module__ = __name__


def _be_nice() -> None:
    """The thread, and those that xgrammar starts from it, give way to the engine's steps."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
