import random

import pytest

from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.train.data.inspection import inspect_examples
from f2l_vllm.train.data.manifest import read_manifest
from f2l_vllm.train.data.world_manifest import KINDS, Film, write_world
from f2l_vllm.video.probe import probe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, videos=4, seed=7, split="held-out")
    return folder


def test_every_video_is_real_and_asked_one_question_of_each_type(world):
    examples = read_manifest(world / "manifest.jsonl")
    assert len(examples) == 4 * len(KINDS)
    good, bad = inspect_examples(examples)
    assert (good, bad) == (examples, [])
    for number, scene in enumerate(sample_scenes(4, 7, "held-out")):
        about = examples[number * len(KINDS) : (number + 1) * len(KINDS)]
        assert [example.task_type for example in about] == list(KINDS)
        assert about[-1].target_text == phrases.caption(scene)
        assert {example.metadata["scene"] for example in about} == {scene.key}
        assert {example.split for example in about} == {"held-out"}
        info = probe(about[0].video_path)
        metadata = about[0].metadata
        assert [info.width, info.height] == metadata["size"]
        assert info.duration_s == pytest.approx(metadata["seconds"], abs=0.05)
        assert info.fps == pytest.approx(metadata["fps"])


def test_films_vary():
    rng = random.Random(0)
    films = [Film.draw(rng) for _ in range(300)]
    assert len(set(films)) > 60
    assert len({film.size for film in films}) == 5


def test_a_second_call_films_only_what_is_missing_or_damaged(world):
    files = sorted((world / "videos").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in files}
    manifest = (world / "manifest.jsonl").read_bytes()
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:500])
    assert write_world(world, videos=4, seed=7, split="held-out")[1] == 2
    after = {path.name: path.stat().st_mtime_ns for path in (world / "videos").iterdir()}
    assert {name for name in before if after[name] != before[name]} == {files[0].name, files[1].name}
    assert after.keys() == before.keys()
    assert (world / "manifest.jsonl").read_bytes() == manifest


def test_more_videos_leave_the_first_ones_as_they_are(world, tmp_path):
    write_world(tmp_path, videos=2, seed=7, split="held-out", questions_per_video=3)
    fewer = read_manifest(tmp_path / "manifest.jsonl")
    assert len(fewer) == 6
    first = sorted((world / "videos").iterdir())[0]
    assert (tmp_path / "videos" / first.name).read_bytes() == first.read_bytes()
    assert write_world(tmp_path, videos=3, seed=7, split="held-out", questions_per_video=3)[1] == 1
    assert read_manifest(tmp_path / "manifest.jsonl")[:6] == fewer


def test_impossible_numbers_of_questions_and_unknown_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be 1 to \d+, one of each type, not 99"):
        write_world(tmp_path, videos=1, seed=0, questions_per_video=99)
    with pytest.raises(ValueError, match="unknown split 'test': choose one of train, held-out"):
        write_world(tmp_path, videos=1, seed=0, split="test")
