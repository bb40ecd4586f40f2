"""Changes how vLLM's engine follows constraints: it compiles them beside its steps and gives up slow ones.

`tests/unit/server/test_vllm_grammars.py` holds a contract test for each patched place.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from f2l_vllm.grammar_limits import matching_seconds

logger = logging.getLogger(__name__)

_COMPILERS = 2  # threads in the engine, so that one constraint does not wait for another
_PATIENCE = 2.0  # the engine's clock includes time that other processes take of its core, a trial's does not


def install() -> None:
    """Make the engine compile beside its steps, at lower priority, and give up answers that are slow to match.

    Idempotent.
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
    # The check at the top recognises our methods by this name.
    for method in (grammar_init, accept_tokens, fill_bitmask):
        method.__module__ = __name__


def _be_nice() -> None:
    """Let this thread, and those that xgrammar starts from it, give way to the engine's steps."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
