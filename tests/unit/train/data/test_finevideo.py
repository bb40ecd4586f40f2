from collections import Counter
from itertools import pairwise

import pytest

from f2l_vllm.train.data.clips import clip_file
from f2l_vllm.train.data.finevideo import PROMPTS, SHARES, build_manifest, seconds_of, split_of
from f2l_vllm.train.data.manifest import read_manifest, write_manifest
from f2l_vllm.video.probe import probe
from tests.support.finevideo_files import SECONDS, FineVideo, entry, scene, times


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """12 good videos of one to five scenes that follow each other."""
    data = FineVideo(tmp_path_factory.mktemp("finevideo"))
    for number in range(12):
        edges = [SECONDS * place / (number % 5 + 1) for place in range(number % 5 + 2)]
        data.add(entry(f"video-{number}", [scene(i, a, b) for i, (a, b) in enumerate(pairwise(edges))]))
    return data


@pytest.fixture(scope="module")
def examples(dataset):
    return build_manifest(dataset.metadata, dataset.videos, seed=3)[0]


def test_the_shares_are_those_of_the_method(examples):
    count = Counter(example.metadata["span"] for example in examples)
    for kind, share in SHARES.items():
        assert count[kind] / len(examples) == pytest.approx(share, abs=1.5 / len(examples))
    assert len({example.id for example in examples}) == len(examples) > 40


def test_targets_and_prompts_follow_the_metadata(examples):
    by_id = {example.id: example for example in examples}
    scenes = [example for example in examples if example.metadata["span"] == "scene"]
    for example in scenes:
        number = int(example.id[-3:])
        assert example.target_text == f"A person does thing {number}. Then thing {number} ends."
        assert example.metadata["titles"] == [f"Scene {number}"]
    whole = by_id[next(name for name in by_id if by_id[name].metadata["span"] == "whole")]
    assert whole.target_text == f"Video {whole.metadata['video_id']} shows a person who plays."
    assert whole.span is None
    adjacent = next(example for example in examples if example.metadata["span"] == "adjacent")
    start, end = adjacent.span
    inside = [e for e in scenes if e.video_path == adjacent.video_path and start <= e.span[0] and e.span[1] <= end]
    assert all(scene.target_text in adjacent.target_text for scene in inside)
    assert adjacent.target_text.count(" ends.") in (2, 3)
    for example in examples:
        assert example.prompt in PROMPTS[example.task_type]
        assert (example.dataset, example.metadata["category"]) == ("finevideo", "Sports")
        assert "say something" not in example.target_text  # no sound
    assert len({example.prompt for example in examples}) == sum(len(prompts) for prompts in PROMPTS.values())


def test_the_same_seed_gives_the_same_manifest_and_another_one_another(dataset, examples, tmp_path):
    again, _ = build_manifest(dataset.metadata, dataset.videos, seed=3)
    assert again == examples
    other, _ = build_manifest(dataset.metadata, dataset.videos, seed=4, limit=4)
    same, _ = build_manifest(dataset.metadata, dataset.videos, seed=3, limit=4)
    assert {e.video_path for e in other} != {e.video_path for e in same}
    write_manifest(tmp_path / "m.jsonl", examples)
    assert read_manifest(tmp_path / "m.jsonl") == examples


def test_a_limit_keeps_the_shares_and_need_not_read_everything(dataset):
    read = []
    examples, _ = build_manifest(
        dataset.metadata, dataset.videos, limit=10, on_progress=lambda done, total: read.append((done, total))
    )
    assert Counter(example.metadata["span"] for example in examples) == {"scene": 6, "adjacent": 3, "whole": 1}
    assert read == [(0, 12)]  # the first 10 videos gave enough


def test_a_video_is_in_one_split_whatever_else_there_is(dataset, examples):
    assert all(example.split == split_of(example.metadata["video_id"]) for example in examples)
    splits = Counter(split_of(f"id-{number}") for number in range(20_000))
    assert {split: round(count / 200) for split, count in splits.items()} == {"train": 96, "validation": 2, "test": 2}


def test_bad_metadata_and_videos_are_left_out_with_a_reason(dataset, tmp_path):
    data = FineVideo(tmp_path)
    good = [scene(i, 10 * i, 10 * i + 10) for i in range(6)]
    for number in range(5):
        data.add(entry(f"good-{number}", good))
    bad_scenes = [
        scene(0, 0, 10),
        scene(1, 0, 0, timestamps={"start_timestamp": None, "end_timestamp": "soon"}),
        scene(2, 0, 0, timestamps=None),
        scene(3, 30, 20),
        scene(4, 10, 30),
        scene(5, 25, 35),
        "no scene",
        scene(7, 35, 61),  # rounded: cut at the end of the video
        scene(8, 58, 75),
        scene(9, 70, 90),
    ]
    data.add(entry("bad", bad_scenes))
    data.add("{")
    data.add({"title": "other data"})
    data.add(entry("gone", good), video=False)
    data.add(entry("good-0", good))
    broken = data.add(entry("broken", good))
    (data.videos / f"{broken}.mp4").unlink()
    (data.videos / f"{broken}.mp4").write_bytes(b"\0\0\0\x20ftypisom" + b"\0" * 100)
    found, rejections = build_manifest(data.metadata, data.videos)
    reasons = {rejection.ids[0]: rejection.reason.split(":")[0] for rejection in rejections}
    twice = [name for name in ("sample_0", "sample_9") if reasons.pop(name, "") == "repeated_video"]
    assert len(twice) == 1
    assert reasons == {
        "bad-scene-1": "missing_timestamps",
        "bad-scene-2": "missing_timestamps",
        "bad-scene-3": "reversed_timestamps",
        "bad-scene-5": "overlapping_scenes",
        "bad-scene-6": "missing_timestamps",
        "bad-scene-8": "beyond_duration",
        "bad-scene-9": "beyond_duration",
        "sample_6": "bad_metadata",
        "sample_7": "bad_metadata",
        "sample_8": "file_not_found",
        "broken": "truncated_video",
    }
    spans = {example.id: example.span for example in found if example.metadata["video_id"] == "bad"}
    usable = {"finevideo-bad", *(f"finevideo-bad-{n}" for n in ("000-000", "004-004", "007-007"))}
    assert set(spans) <= usable  # scenes with one left out between them are not adjacent
    assert all(end <= SECONDS for _, end in filter(None, spans.values()))


def test_the_file_may_have_the_name_it_had_at_its_origin(dataset, tmp_path):
    data = FineVideo(tmp_path)
    for number in range(5):
        name = data.add(entry(f"orig-{number}", [scene(i, 10 * i, 10 * i + 10) for i in range(6)]))
        (data.videos / f"{name}.mp4").rename(data.videos / f"orig-{number}.mp4")
    examples, rejections = build_manifest(data.metadata, data.videos)
    assert not rejections
    assert {example.video_path.name for example in examples} == {f"orig-{number}.mp4" for number in range(5)}


def test_a_target_is_empty_where_the_metadata_has_none(tmp_path):
    data = FineVideo(tmp_path)
    for number in range(5):
        silent = [scene(i, 10 * i, 10 * i + 10, activities=[], title=None) for i in range(6)]
        data.add(entry(f"silent-{number}", silent, description=None))
    examples, _ = build_manifest(data.metadata, data.videos)
    assert {example.target_text for example in examples} == {""}


def test_a_folder_without_a_single_span_says_why(tmp_path):
    data = FineVideo(tmp_path)
    with pytest.raises(ValueError, match=r"holds no \.json file"):
        build_manifest(data.metadata, data.videos)
    data.add(entry("a", [scene(0, 30, 20)]))
    with pytest.raises(ValueError, match=r"Too few spans .* 1 videos and scenes were left out.*reversed_timestamps"):
        build_manifest(data.metadata, data.videos)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("01:02:03.500", 3723.5),
        ("00:07.250", 7.25),
        ("00:00:59", 59),
        (" 00:00:01.000 ", 1),
        ("7", None),
        ("", None),
        (None, None),
        (3.5, None),
        ("00:00:-1", None),
        ("a:b:c", None),
    ],
)
def test_timestamps(text, seconds):
    assert seconds_of(text) == seconds
    assert seconds_of(times(3723.5, 4000)["start_timestamp"]) == 3723.5


def test_a_span_can_be_cut_out(examples, tmp_path):
    example = next(one for one in examples if one.metadata["span"] == "adjacent")
    start, end = example.span
    assert probe(clip_file(example, tmp_path)).duration_s == pytest.approx(end - start, abs=0.51)
