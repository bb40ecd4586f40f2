"""Servers of other settings than the one that most modules here share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from tests.support.collector import Collector
from tests.support.server import Server

CHUNK_SECONDS = 8
RATE = 0.5  # of merged visual tokens


@pytest.fixture(scope="session")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The default model with few places for adapters and prompts read in parts; a chunk for every eight seconds; it
    calls tools, and fetches from this machine."""
    places = ("--max-loras", "3", "--max-cpu-loras", "4", "--enable-prefix-caching", "--enable-chunked-prefill")
    chunks = ("--chunk-seconds", str(CHUNK_SECONDS), "--max-chunks", "3")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "pythonic")
    json_at_once = (
        "--structured-outputs-config",
        '{"backend": "xgrammar", "disable_any_whitespace": true}',
    )  # spaces tempt a small model
    home = tmp_path_factory.mktemp("default") / "home"
    flags, env = (*places, *chunks, *tools, *json_at_once), {"F2L_ALLOWED_MEDIA_DOMAINS": "127.0.0.1"}
    with Server("f2l-tiny", home, *flags, env=env) as server:
        yield server


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Has the spans of `other_server`."""
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="session")
def other_server(
    hypernetwork_model: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Server]:
    """Keys of the catalog; half of the visual tokens; adapters on disk only; its workers' methods can be called; it
    stores responses. Its log is JSON, with vLLM's requests in it, and its spans are collected."""
    home = tmp_path_factory.mktemp("other") / "home"
    merging = ("--video-pruning-rate", str(RATE), "--merge-rate", str(RATE))
    env = {
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_SERVER_DEV_MODE": "1",
        "F2L_EXTRA_ROUTES": "/collective_rpc",
        "F2L_HOT_BYTES": "0",
        **collector.environment,
    }
    log = ("--log-format", "json", "--enable-log-requests")
    flags, key = ("--tenants", "catalog", *merging, *log), keys_of(home)("add", "news")
    with Server(hypernetwork_model, home, *flags, api_key=key, env=env) as server:
        yield server


def keys_of(home: Path) -> Callable[..., str]:
    """`f2l-vllm keys` for this data folder: what it prints."""

    def keys(*words: str) -> str:
        found = CliRunner().invoke(app, ["keys", *words, "--home", str(home)])
        assert found.exit_code == 0, found.output
        return found.stdout.strip()

    return keys
