"""Servers of other settings than the one that most modules here share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from tests.e2e.conftest import Shared
from tests.support.collector import Collector
from tests.support.server import Server

CHUNK_SECONDS = 8
RATE = 0.5  # of merged visual tokens


@pytest.fixture(scope="module")
def default_server(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The default model with few places for adapters and prompts read in parts; a chunk for every eight seconds; it
    calls tools, and fetches from this machine."""
    places = ("--max-loras", "3", "--max-cpu-loras", "4", "--enable-prefix-caching", "--enable-chunked-prefill")
    chunks = ("--chunk-seconds", str(CHUNK_SECONDS), "--max-chunks", "3")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "pythonic")
    json_at_once = (
        "--structured-outputs-config",
        '{"backend": "xgrammar", "disable_any_whitespace": true}',
    )  # spaces tempt a small model
    flags, env = (*places, *chunks, *tools, *json_at_once), {"F2L_ALLOWED_MEDIA_DOMAINS": "127.0.0.1"}
    return shared.get(
        "default", lambda: Server("f2l-tiny", tmp_path_factory.mktemp("default") / "home", *flags, env=env)
    )


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Has the spans of `other_server`."""
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def other_server(
    shared: Shared, hypernetwork_model: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Server:
    """Keys of the catalog; half of the visual tokens; adapters on disk only; its workers' methods can be called; it
    stores responses; it has no console. Its log is JSON, with vLLM's requests in it, and its spans are collected."""
    merging = ("--video-pruning-rate", str(RATE), "--merge-rate", str(RATE))
    env = {
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_SERVER_DEV_MODE": "1",
        "F2L_EXTRA_ROUTES": "/collective_rpc",
        "F2L_HOT_BYTES": "0",
        "CUDA_HOME": "/none",  # as on a machine that never had a GPU
        **collector.environment,
    }
    log = ("--log-format", "json", "--enable-log-requests")
    flags = ("--tenants", "catalog", "--no-console", *merging, *log)

    def start() -> Server:
        home = tmp_path_factory.mktemp("other") / "home"
        return Server(hypernetwork_model, home, *flags, api_key=keys_of(home)("add", "news"), env=env)

    return shared.get("other", start)


def keys_of(home: Path) -> Callable[..., str]:
    """`f2l-vllm keys` for this data folder: what it prints."""

    def keys(*words: str) -> str:
        found = CliRunner().invoke(app, ["keys", *words, "--home", str(home)])
        assert found.exit_code == 0, found.output
        return found.stdout.strip()

    return keys
