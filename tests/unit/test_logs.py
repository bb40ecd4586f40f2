"""What is logged, and how; and that what is left out is what is meant."""

import json
import logging
import os
import subprocess
import sys
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest

from f2l_vllm import logs

SITE = Path(find_spec("vllm").origin).parents[1]


def record(name, message, *args, level=logging.INFO):
    return logging.LogRecord(name, level, "file.py", 1, message, args, None)


def worth(name, message, *args, level=logging.INFO):
    return logs.is_worth_saying(record(name, message, *args, level=level))


def source(name):
    """Of the module that a logger is named after; of the whole package for one that is a package's."""
    path = SITE / Path(*name.split("."))
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return "\n".join(file.read_text(errors="replace") for file in files)


@pytest.mark.parametrize(("name", "start"), [entry for entry in logs._NOISE + logs._WORTH_KNOWING if entry[1]])
def test_the_messages_that_are_known_are_there_in_these_versions(name, start):
    if start == "Engine 0":
        assert '"Engine {:03d}: "' in source(name)
    elif name == "transformers":
        assert "must be `None` or an integer within the vocabulary" in source("transformers.configuration_utils")
    elif name == "ray":
        assert f'"{start}' in source("ray._private.authentication.authentication_token_setup")
    else:
        assert f'"{start}' in source(name)


def test_at_info_others_are_heard_when_they_warn():
    assert worth("f2l_vllm.pool.pool", "hypernetwork worker ready")
    assert not worth("f2l_vllm.pool.pool", "looked", level=logging.DEBUG)
    assert not worth("vllm.config.model", "Resolved architecture: %s")
    assert worth("vllm.config.model", "something else", level=logging.WARNING)
    assert worth("vllm.v1.engine.core", "EngineCore failed to start.", level=logging.ERROR)
    assert worth("vllm.v1.engine.core_client", "[shutdown] MPClient: engine core exited", level=logging.WARNING)
    assert worth("vllm.v1.metrics.loggers", "Engine 000: Avg prompt throughput: %.1f tokens/s")
    assert not worth("vllm.v1.worker.cpu_worker", "%s is not found in LD_PRELOAD", level=logging.WARNING)
    assert worth("transformers.modeling_utils", "weights are missing", level=logging.WARNING)
    assert worth("ray._private.worker", "no space left", level=logging.WARNING)
    assert worth("vllmish", "a neighbour", level=logging.WARNING)
    assert not worth("vllmish", "a neighbour")


def test_requests_are_logged_but_for_those_of_supervisors(monkeypatch):
    def access(path, status=200):
        return worth("uvicorn.access", '%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "GET", path, "1.1", status)

    assert access("/v1/files?limit=1")
    assert access("/v1/chat/completions", 500)
    assert not access("/health")
    assert not access("/ready?x=1", 503)
    monkeypatch.setattr(logs, "quiet_paths", {"/v1/models"})
    assert not access("/v1/models")
    assert access("/health")


def test_warnings_for_developers_are_left_to_them():
    assert worth("py.warnings", "%s", "x.py:1: UserWarning: the device is full\n", level=logging.WARNING)
    assert not worth("py.warnings", "%s", "x.py:1: FutureWarning: will go\n", level=logging.WARNING)


@pytest.mark.parametrize(("level", "vllm"), [("debug", ""), ("info", "DEBUG"), ("error", "")])
def test_levels(monkeypatch, level, vllm):
    monkeypatch.setattr(logs, "_LEVEL", logs.LEVELS[level])
    monkeypatch.setattr(logs, "_ASKED_OF_VLLM", vllm)
    everything = level == "debug" or bool(vllm)
    assert worth("vllm.platforms.cpu", "Triton is not installed", level=logging.WARNING) is everything
    assert worth("f2l_vllm.x", "said") is (level != "error")
    assert worth("f2l_vllm.x", "said", level=logging.ERROR)


PROGRAM = """
import logging, logging.config, json, sys, warnings
from f2l_vllm import logs
if sys.argv[1] == "vllm":
    logging.config.dictConfig(json.loads(logs.CONFIG.read_text()))
else:
    logs.configure("pool")
loud = logging.getLogger("transformers")
loud.addHandler(logging.StreamHandler()); loud.propagate = False
logs.adopt("transformers")
logging.getLogger("f2l_vllm.pool").info("two\\nlines")
logging.getLogger("f2l_vllm.pool").debug("details")
logging.getLogger("vllm.engine").info("chatter")
logging.getLogger("vllm.engine").warning("act on %s", "this")
logging.getLogger("transformers.x").warning("and on this")
warnings.warn("a warning")
try: 1 / 0
except ZeroDivisionError: logging.getLogger("f2l_vllm").exception("failed")
"""


@pytest.mark.parametrize(("how", "part"), [("vllm", "server"), ("pool", "pool")])
@pytest.mark.parametrize("level", ["info", "debug"])
def test_everybody_has_one_format(how, part, level):
    env = {**os.environ, "F2L_LOG_LEVEL": level}
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], env=env, capture_output=True, text=True, check=True)
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    told = [line.split(" ", 2)[2] for line in lines]
    chatter = [f"DEBUG {part}: details", f"INFO {part}: [vllm.engine] chatter"] if level == "debug" else []
    assert told[: 4 + len(chatter)] == [
        f"INFO {part}: two",
        f"INFO {part}: lines",
        *chatter,
        f"WARNING {part}: [vllm.engine] act on this",
        f"WARNING {part}: [transformers.x] and on this",
    ]
    assert f"WARNING {part}: [py.warnings] <string>:" in told[4 + len(chatter)]
    assert f"ERROR {part}: failed" in told
    assert told[-1] == f"ERROR {part}: ZeroDivisionError: division by zero"


JSON_PROGRAM = """
import logging, sys
from f2l_vllm import logs
logs.configure("pool")
logger = logging.getLogger("f2l_vllm.pool")
logger.info("two\\nlines of %s", "é", extra={"video": 3})
logs.request_id.set("r-1")
logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "GET", "/v1/files", "1.1", 200)
logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "GET", "/health", "1.1", 200)
logging.getLogger("vllm.engine").info("chatter")
try: 1 / 0
except ZeroDivisionError: logger.exception("failed")
"""


def test_as_json_every_event_is_a_line_that_names_its_request():
    env = {**os.environ, "F2L_LOG_FORMAT": "JSON"}
    command = [sys.executable, "-c", JSON_PROGRAM]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr
    first, access, failed = (json.loads(line) for line in said.splitlines())
    times = [datetime.fromisoformat(line.pop("time")) for line in (first, access, failed)]
    assert times == sorted(times)
    assert times[0].utcoffset() == timedelta(0)
    common = {"level": "INFO", "part": "pool"}
    assert first == common | {"logger": "f2l_vllm.pool", "message": "two\nlines of é", "video": 3}
    request = {"client": "127.0.0.1:5", "method": "GET", "path": "/v1/files", "status": 200, "request_id": "r-1"}
    text = '127.0.0.1:5 - "GET /v1/files HTTP/1.1" 200'
    assert access == common | request | {"logger": "uvicorn.access", "message": text}
    assert (failed["level"], failed["message"], failed["request_id"]) == ("ERROR", "failed", "r-1")
    assert failed["exception"].endswith("ZeroDivisionError: division by zero")


def test_an_operators_own_logging_is_left_alone():
    path = "VLLM_LOGGING_CONFIG_PATH"
    assert logs.environment({}, [])[path] == str(logs.CONFIG)
    assert logs.environment({path: "/mine.json"}, [])[path] == "/mine.json"
    assert path not in logs.environment({"VLLM_CONFIGURE_LOGGING": "0"}, [])
    for flag in ("--log-config-file=x", "--log_config_file", "--logging-config.formatter"):
        assert path not in logs.environment({}, [flag, "json"])
    assert logs.environment({"PYTHONWARNINGS": "error"}, [])["PYTHONWARNINGS"] == "error,ignore:resource_tracker"


def test_the_leaked_semaphores_of_a_killed_engine_are_no_warning():
    program = "import warnings; warnings.warn('resource_tracker: There appear to be 1 leaked'); warnings.warn('other')"
    env = {**os.environ, "PYTHONWARNINGS": logs.environment({}, [])["PYTHONWARNINGS"]}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert "leaked" not in run.stderr
    assert "other" in run.stderr


def test_a_server_that_stops_says_no_statistics():
    statistics = logging.getLogger("vllm.v1.metrics.loggers")
    level = statistics.level
    try:
        statistics.setLevel(logging.INFO)
        logs.without_statistics()
        assert not statistics.isEnabledFor(logging.INFO)
        assert statistics.isEnabledFor(logging.WARNING)
    finally:
        statistics.setLevel(level)
