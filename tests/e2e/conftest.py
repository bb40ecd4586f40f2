from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from f2l_vllm.evaluation.server import started_server
from tests.support.s3 import S3, temporary_s3
from tests.support.server import Server
from tests.support.videos import write_video

# With several processes each line is run by one of them, and then all other modules. What takes longest comes first, so
# that none is left alone at its end; modules in a line share a server, which is started once and ends with the line.
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
        "server/test_bench_over_http.py",
    ),
    ("faults/test_server_faults.py",),
    ("server/test_history.py",),
    ("server/test_s3_store.py", "evaluation/test_evaluate.py"),
    ("pool/test_pool.py",),
    ("server/test_leaks_over_http.py", "server/test_spans_over_http.py", "server/test_documents_over_http.py"),
    ("console/test_page.py", "console/test_gallery.py", "console/test_asking.py"),
    ("recipes/test_shipped_model.py",),
    ("cluster/test_serve.py",),
    ("cluster/test_workers.py",),
    (
        "server/test_catalog_keys.py",
        "server/test_batches_over_http.py",
        "server/test_log_over_http.py",
        "server/test_traces_over_http.py",
        "server/test_lost_adapters_over_http.py",
        "server/test_merging_over_http.py",
    ),
    ("pool/test_pool_process.py",),
    ("recipes/test_stages.py",),
    ("bench/test_bench.py",),
    ("train/test_training_command.py",),
    ("pool/test_workers.py",),
    ("engine/test_smolvlm_video.py",),
)
_FIRST = {f"tests/e2e/{module}": line[0] for line in LINES for module in line}  # of the same line


def _module(nodeid: str) -> str:
    return nodeid.split("::", 1)[0]


def _line(nodeid: str) -> str:
    return _FIRST.get(_module(nodeid), _module(nodeid))


_T = TypeVar("_T")


class Shared:
    """What the modules of a line share. A server that nobody asks anything still takes some hundredths of a core."""

    def __init__(self) -> None:
        self._stack, self._open = ExitStack(), dict[str, Any]()

    def get(self, name: str, start: Callable[[], AbstractContextManager[_T]]) -> _T:
        """What `start` gives; it is entered once in a line."""
        if name not in self._open:
            self._open[name] = self._stack.enter_context(start())
        found: _T = self._open[name]
        return found

    def close(self) -> None:
        self._open.clear()
        self._stack.close()


_SHARED = Shared()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or _line(item.nodeid) != _line(nextitem.nodeid):
        _SHARED.close()


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    yield _SHARED
    _SHARED.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort modules as they stand in the lines."""
    places = {module: place for place, module in enumerate(_FIRST)}
    items.sort(key=lambda item: places.get(_module(item.nodeid), len(places)))


class _Lines(LoadFileScheduling):
    """`--dist loadfile`, with a line for a file."""

    def _split_scope(self, nodeid: str) -> str:
        return _line(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _Lines | None:
    return _Lines(config, log) if config.option.dist == "loadfile" else None


@pytest.fixture(scope="module")
def server(shared: Shared, hypernetwork_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """One server over the random model for all tests of a line that leave it as they found it."""
    return shared.get("server", lambda: Server(hypernetwork_model, tmp_path_factory.mktemp("server") / "home"))


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A real one, with an empty bucket."""
    with temporary_s3() as s3:
        yield s3


@pytest.fixture(scope="module")
def evaluated_url(shared: Shared, s3: S3) -> str:
    """The base URL of a server as `f2l-vllm eval` starts it, over the default model. Its store is in S3."""

    @contextmanager
    def start() -> Iterator[str]:
        with ExitStack() as stack:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in {**s3.environment, "F2L_STORE": s3.url}.items():
                    patch.setenv(name, value)
                flags = "--kv-cache-memory-bytes 200000000"
                url = stack.enter_context(started_server("f2l-tiny", None, None, flags))
            yield url

    return shared.get("evaluated", start)


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
