"""The short form of `benchmarks.leaks`: more videos than places, all coming and going, each answering as itself."""

import asyncio
from argparse import Namespace

import pytest

from benchmarks.fleet import films
from benchmarks.leaks import run


@pytest.fixture(scope="module")
def found(default_server, tmp_path_factory):
    for file in default_server.client.files.list():  # of other tests
        default_server.client.files.delete(file.id)
    paths = films(tmp_path_factory.mktemp("films"), 8, seed=3, fps=10)
    options = Namespace(questions=160, concurrency=4, change_every=10, seed=3)
    return asyncio.run(run(default_server, paths, options))


def test_every_answer_is_the_videos_own(found):
    counts = found["counts"]
    assert found["wrong"] == []
    assert found["distinct_answers"] > 4
    changed = {"deleted and uploaded again", "expired and uploaded again"}
    assert set(counts) <= {"right", "left", "gone meanwhile", *changed}
    assert counts["right"] > 50
    assert all(counts[how] > 2 for how in changed)


def test_nothing_is_left(found):
    assert set(found["left_1_s_after_the_last_delete"].values()) == {0}
