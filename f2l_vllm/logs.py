"""One log for every process of a server, on standard error: one format, and only what an operator reads or acts on.

`F2L_LOG_LEVEL` is `info` by default. It shows this package's messages, requests, vLLM's throughput, and all warnings
and errors except those in `_NOISE`. `debug` shows everything that vLLM, Ray and transformers log;
`VLLM_LOGGING_LEVEL=DEBUG` adds vLLM's own debugging. With `F2L_LOG_FORMAT=json` every event is one line of JSON, which
names the request that it is about. `logging.json` installs the handler where vLLM configures logging,
`configure` installs it elsewhere.
"""

from __future__ import annotations

import json
import logging
import logging.config
import multiprocessing
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

CONFIG = Path(__file__).with_name("logging.json")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_LEVEL = LEVELS.get(os.environ.get("F2L_LOG_LEVEL", "info").lower(), logging.INFO)
OUR_LEVEL = _LEVEL
_ASKED_OF_VLLM = os.environ.get("VLLM_LOGGING_LEVEL", "").upper()
VLLM_LEVEL = _ASKED_OF_VLLM if _ASKED_OF_VLLM in logging.getLevelNamesMapping() else logging.INFO

_STATISTICS = "vllm.v1.metrics.loggers"  # every ten seconds
# Shown at `info` too: logger, and how the message begins before its values are put in.
_WORTH_KNOWING = (
    ("uvicorn.access", ""),
    (_STATISTICS, "Engine 0"),
    ("vllm.model_executor.model_loader.default_loader", "Loading weights took"),
    ("vllm.v1.core.kv_cache_utils", "%s KV cache size"),
)
# Warnings that nobody needs to act on, in the same form.
_NOISE = (
    ("vllm.utils.system_utils", "Found ulimit of"),  # some thousands of open files are enough
    ("vllm.platforms.cpu", "Triton is not installed"),  # the CPU platform of this package needs none
    ("vllm.platforms.cpu", "Reset SSM cache type"),  # the base models here have no such layers
    ("vllm.config.vllm", "Model Runner V2 requires Triton"),  # the other runner is the intended one
    ("vllm.config.vllm", "Inductor compilation was disabled"),  # docs/deploy.md says why
    ("vllm.v1.worker.cpu_worker", ""),  # preloaded libraries and threads: see docs/deploy.md
    ("vllm.v1.utils", "[shutdown]"),  # vLLM asks the engine to end and kills it in one step
    ("transformers", "Model config: pad_token_id"),  # from the released models' configuration; nothing is padded
    ("ray", "Token authentication is enabled"),  # as it should be
)
_WARNINGS_FOR_DEVELOPERS = re.compile(r"\b(Future|Deprecation|PendingDeprecation|Resource|Import)Warning: ")
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics", "/ping", "/version"})
_PARTS = {"MainProcess": "server", "EngineCore": "engine"}

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that is being answered
quiet_paths: set[str] = set(_QUIET_PATHS)  # requests for these are not logged: supervisors send them all the time


def without_statistics() -> None:
    """Log no more throughput: the server is stopping."""
    logging.getLogger(_STATISTICS).setLevel(logging.WARNING)


class Handler(logging.StreamHandler):
    """Writes every logger's records in one format. Replaces the handlers that libraries install for themselves."""

    def __init__(self, part: str | None = None) -> None:
        super().__init__(sys.stderr)
        process = multiprocessing.current_process().name
        part = part or _PARTS.get(process, process)
        is_json = os.environ.get("F2L_LOG_FORMAT", "").lower() == "json"
        self.setFormatter(_json_formatter(part) if is_json else _Formatter(part))
        self.addFilter(is_worth_saying)
        self.addFilter(_with_its_request)
        logging.captureWarnings(True)


class _Formatter(logging.Formatter):
    """Starts every line with the time, the level, the part of the server, and the logger's name if it is not ours."""

    def __init__(self, part: str) -> None:
        super().__init__(datefmt="%m-%d %H:%M:%S")
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        name = "" if record.name.split(".")[0] == "f2l_vllm" else f"[{record.name}] "
        start = f"{self.formatTime(record, self.datefmt)} {record.levelname} {self._part}: {name}"
        return "\n".join(start + line for line in super().format(record).splitlines() if line.strip())


def _json_formatter(part: str) -> logging.Formatter:
    """Writes the time, the level, the part of the server, the logger, the message, and what else a record has."""
    from pythonjsonlogger.core import RESERVED_ATTRS
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        reserved_attrs=[*RESERVED_ATTRS, "color_message", "vllm_process_name"],  # they say nothing more
        static_fields={"part": part},
        timestamp="time",
        json_ensure_ascii=False,
    )


def _with_its_request(record: logging.LogRecord) -> bool:
    """Note the request that a record is about, and what an access line says, as fields of their own."""
    if (name := request_id.get()) is not None:
        record.request_id = name
    if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
        record.client, record.method, record.path, _, record.status = record.args
    return True


def is_worth_saying(record: logging.LogRecord) -> bool:
    """Whether a record is shown at this level."""
    if _LEVEL == logging.DEBUG or (_ASKED_OF_VLLM and _is_of(record, "vllm")):
        return True
    if record.levelno < _LEVEL or _is_among(record, _NOISE):
        return False
    if record.name == "uvicorn.access":
        _, _, path, *_ = record.args if isinstance(record.args, tuple) else ("", "", "")
        return str(path).split("?")[0] not in quiet_paths
    if record.name == "py.warnings":
        return not _WARNINGS_FOR_DEVELOPERS.search(record.getMessage())
    return record.levelno >= logging.WARNING or _is_of(record, "f2l_vllm") or _is_among(record, _WORTH_KNOWING)


def configure(part: str) -> None:
    """Set up this log in a process whose logging vLLM does not configure."""
    logging.config.dictConfig(json.loads(CONFIG.read_text()))
    logging.getLogger().handlers[:] = [Handler(part)]


def is_configured() -> bool:
    """Whether this process writes this log."""
    return any(isinstance(handler, Handler) for handler in logging.getLogger().handlers)


def adopt(*libraries: str) -> None:
    """Make libraries that install their own handlers on import write to this log instead."""
    if is_configured():
        for name in libraries:
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True


def environment(given: Mapping[str, str], flags: Sequence[str]) -> dict[str, str]:
    """Environment variables that make vLLM write this log, unless the operator has configured vLLM's logging."""
    # After an engine was killed, Python's resource tracker warns about the semaphores that it cleaned up.
    known = [given["PYTHONWARNINGS"]] if given.get("PYTHONWARNINGS") else []
    env = {"PYTHONWARNINGS": ",".join([*known, "ignore:resource_tracker"])}
    if _LEVEL != logging.DEBUG:  # it warns of working configurations before a plugin can adopt it
        env["TRANSFORMERS_VERBOSITY"] = given.get("TRANSFORMERS_VERBOSITY") or "error"
    own = ("--log-config-file", "--log_config_file", "--logging-config", "--logging_config")
    if any(flag.startswith(own) for flag in flags) or given.get("VLLM_CONFIGURE_LOGGING", "1") == "0":
        return env
    return {**env, "VLLM_LOGGING_CONFIG_PATH": given.get("VLLM_LOGGING_CONFIG_PATH") or str(CONFIG)}


def _is_of(record: logging.LogRecord, package: str) -> bool:
    return record.name == package or record.name.startswith(f"{package}.")


def _is_among(record: logging.LogRecord, table: Sequence[tuple[str, str]]) -> bool:
    message = str(record.msg)
    return any(_is_of(record, name) and message.startswith(start) for name, start in table)
