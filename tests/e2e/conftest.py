from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import Server
from tests.support.videos import write_video

# The modules that take longest: with several at a time they come first, so that none of them is left alone at the end.
LONGEST = (
    "faults/test_server_faults.py",
    "pool/test_pool.py",
    "server/test_server_life.py",
    "recipes/test_stages.py",
    "server/test_history.py",
    "pool/test_pool_process.py",
    "train/test_training_command.py",
    "evaluation/test_evaluate.py",
    "engine/test_smolvlm_video.py",
    "recipes/test_shipped_model.py",
    "bench/test_bench.py",
    "server/test_many_videos_over_http.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort modules: the longest first."""
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def server(hypernetwork_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server over the random model for all tests that leave it as they found it."""
    server = Server(hypernetwork_model, tmp_path_factory.mktemp("server") / "home")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


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
