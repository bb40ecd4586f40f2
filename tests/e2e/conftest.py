from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.support.server import Server
from tests.support.videos import write_video

# With several processes each line is run by one of them, and then all other modules. What takes longest comes first, so
# that none is left alone at its end; modules in a line share a server, which is started once.
LINES = (
    (
        "cli/test_server_process.py",
        "server/test_server_life.py",
        "server/test_many_videos_over_http.py",
        "server/test_questions_over_http.py",
        "server/test_messages_over_http.py",
        "server/test_responses_over_http.py",
        "server/test_schema_over_http.py",
        "server/test_targets_over_http.py",
        "server/test_damaged_adapters_over_http.py",
        "server/test_hostile_over_http.py",
        "server/test_bad_input_over_http.py",
        "server/test_content_over_http.py",
        "server/test_corpus_over_http.py",
        "server/test_files_over_http.py",
        "server/test_routes_over_http.py",
        "server/test_dashboards_over_http.py",
        "server/test_upload_over_http.py",
        "server/test_ramp_over_http.py",
    ),
    ("faults/test_server_faults.py",),
    ("pool/test_pool.py",),
    ("recipes/test_shipped_model.py",),
    ("server/test_leaks_over_http.py", "server/test_spans_over_http.py", "server/test_documents_over_http.py"),
    (
        "server/test_catalog_keys.py",
        "server/test_log_over_http.py",
        "server/test_traces_over_http.py",
        "server/test_lost_adapters_over_http.py",
        "server/test_merging_over_http.py",
    ),
    ("recipes/test_stages.py",),
    ("server/test_history.py",),
    ("pool/test_pool_process.py",),
    ("bench/test_bench.py",),
    ("cluster/test_workers.py",),
    ("evaluation/test_evaluate.py",),
    ("cluster/test_serve.py",),
    ("train/test_training_command.py",),
    ("pool/test_workers.py",),
    ("server/test_s3_store.py",),
    ("engine/test_smolvlm_video.py",),
)
_FIRST = {f"tests/e2e/{module}": line[0] for line in LINES for module in line}  # of the same line


def _module(nodeid: str) -> str:
    return nodeid.split("::", 1)[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort modules as they stand in the lines."""
    places = {module: place for place, module in enumerate(_FIRST)}
    items.sort(key=lambda item: places.get(_module(item.nodeid), len(places)))


class _Lines(LoadFileScheduling):
    """`--dist loadfile`, with a line for a file."""

    def _split_scope(self, nodeid: str) -> str:
        return _FIRST.get(_module(nodeid), _module(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _Lines | None:
    return _Lines(config, log) if config.option.dist == "loadfile" else None


@pytest.fixture(scope="session")
def server(hypernetwork_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server over the random model for all tests that leave it as they found it."""
    with Server(hypernetwork_model, tmp_path_factory.mktemp("server") / "home") as server:
        yield server


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six short videos that differ."""
    folder = tmp_path_factory.mktemp("clips")
    sizes = [(64, 48), (320, 240), (240, 320), (128, 128), (640, 360), (96, 64)]
    return [write_video(folder / f"{i}.mp4", frames=20 + 7 * i, fps=8 + i, size=size) for i, size in enumerate(sizes)]


@pytest.fixture(scope="session")
def slow_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that takes seconds to decode: one key frame, and the last sampled frame near the end."""
    options = {"preset": "ultrafast", "g": "100000"}
    path = tmp_path_factory.mktemp("slow") / "slow.mp4"
    return write_video(path, frames=1500, fps=30, size=(960, 540), options=options)
