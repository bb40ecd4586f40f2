"""`python -m f2l_vllm.server.chat.grammar_child LIMITS`: tries each constraint in a forked process.

Its standard input holds messages of JSON, as a `multiprocessing.connection` sends bytes: the tokenizer's vocabulary as
xgrammar writes it, and then requests, `{"id", "kind", "text"}` or `{"cancel": id}`. Answers are lines of JSON:
`{"id"}` for a constraint that compiles and can be followed within the limits; `{"id", "invalid": why}`;
`{"id", "slow": why}`. It ends with its parent.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import xgrammar
from pydantic import ValidationError

from f2l_vllm.grammar_limits import GrammarLimits, matching_seconds

_STEPS = 1000  # tokens of a trial answer: an ambiguous grammar costs more as the answer grows
_XGRAMMARS_PREFIX = re.compile(r"^\[[\d:]+\] \S+:\d+: ")  # time and source line


class _Refused(Exception):
    """The constraint compiles but is useless; `args[0]` says why."""


class _Slow(Exception):
    """The constraint takes too long to follow."""


def main(limits_json: str) -> None:
    """Answer requests until standard input closes."""
    limits = GrammarLimits(**json.loads(limits_json))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that prints cannot disturb an answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests = Connection(sys.stdin.fileno(), writable=False)
    if (written := _read(requests)) is None:
        return
    vocabulary = xgrammar.TokenizerInfo.deserialize_json(written)
    trials: dict[int, int] = {}  # process -> id of its request
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _send(answers, {"ready": True})
    while True:
        ready = wait([requests, ended])
        if ended in ready:
            os.read(ended, 1 << 12)
            _collect(trials, answers)
        if requests not in ready:
            continue
        if (request := _read(requests)) is None:
            break
        if "cancel" in request:
            for process, known in trials.items():
                if known == request["cancel"]:
                    os.kill(process, signal.SIGKILL)
            continue
        process = os.fork()
        if process == 0:
            signal.set_wakeup_fd(-1)
            _try(request, vocabulary, limits, answers)
        trials[process] = request["id"]
    for process in trials:
        os.kill(process, signal.SIGKILL)


def _read(requests: Connection) -> Any:
    """The next message; None if the parent has gone, be it in the middle of one."""
    try:
        return json.loads(requests.recv_bytes())
    except (EOFError, OSError):
        return None


def _collect(trials: dict[int, int], answers: int) -> None:
    while trials:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        request = trials.pop(process)
        if status != 0:  # a process that ended in order has sent its answer
            why = "it takes more time or memory to compile than it may"
            _send(answers, {"id": request, "slow": why, "died": True})


def _try(request: dict[str, Any], vocabulary: xgrammar.TokenizerInfo, limits: GrammarLimits, answers: int) -> None:
    """Try one constraint in the forked process, then end that process."""
    code = 1
    try:
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = math.ceil(used.ru_utime + used.ru_stime + limits.seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
        signal.alarm(math.ceil(2 * limits.seconds))
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            _follow(_compile(request["kind"], request["text"], vocabulary), vocabulary)
        except _Slow:
            answer["slow"] = "answers under it take too long to follow"
        except MemoryError:
            answer["slow"] = "it takes more memory to compile than it may"
        except _Refused as error:
            answer["invalid"] = str(error)
        except ValidationError as error:
            told = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
            answer["invalid"] = "; ".join(told)[:500]
        except UnicodeError:  # the compiler's message cuts a character in two
            answer["invalid"] = "it cannot be parsed"
        except (LookupError, TypeError, AttributeError):  # the message would be Python's
            answer["invalid"] = f"it has not the form of a {request['kind'].replace('_', ' ')}"
        except Exception as error:
            answer["invalid"] = _XGRAMMARS_PREFIX.sub("", str(error))[:500]
        _send(answers, answer)
        code = 0
    finally:
        os._exit(code)


def _compile(kind: str, text: str, vocabulary: xgrammar.TokenizerInfo) -> xgrammar.CompiledGrammar:
    """Compile like vLLM's engine (`v1/structured_output/backend_xgrammar.py`), but on one thread."""
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
    match kind:
        case "json":
            return compiler.compile_json_schema(text)
        case "regex":
            return compiler.compile_regex(text)
        case "lark":
            return compiler.compile_lark(text)
        case "structural_tag" if "structures" in (tag := json.loads(text)):
            items = [
                xgrammar.StructuralTagItem(begin=one["begin"], schema=json.dumps(one["schema"]), end=one["end"])
                for one in tag["structures"]
            ]
            return compiler.compile_structural_tag(items, tag["triggers"])
        case "structural_tag":
            return compiler.compile_structural_tag(text)
        case _:
            return compiler.compile_grammar(text)


def _follow(compiled: xgrammar.CompiledGrammar, vocabulary: xgrammar.TokenizerInfo) -> None:
    """Follow two trial answers: one of random tokens, and one of always the first allowed token, to show ambiguity."""
    bits = xgrammar.allocate_token_bitmask(1, vocabulary.vocab_size)
    text = np.ones(vocabulary.vocab_size, dtype=bool)
    text[vocabulary.stop_token_ids] = False
    chance = random.Random(0)
    for pick in (chance.choice, lambda tokens: tokens[0]):
        matcher, spent = xgrammar.GrammarMatcher(compiled), 0.0
        for step in range(_STEPS):
            started = time.thread_time()
            matcher.fill_next_token_bitmask(bits)
            spent += time.thread_time() - started
            unpacked = np.unpackbits(bits.numpy().view(np.uint8), count=text.size, bitorder="little")
            allowed = unpacked.view(bool)
            if step == 0 and not allowed.any():
                raise _Refused("no answer can begin under it")
            tokens = np.flatnonzero(allowed & text)
            if tokens.size == 0:
                break
            started = time.thread_time()
            matcher.accept_token(int(pick(tokens)))
            spent += time.thread_time() - started
            if spent > matching_seconds(step):
                raise _Slow


def _send(descriptor: int, answer: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(answer).encode() + b"\n")  # shorter than PIPE_BUF, so in one piece


if __name__ == "__main__":
    main(sys.argv[1])
