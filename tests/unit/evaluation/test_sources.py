import json
from pathlib import Path

import pytest

from f2l_vllm.evaluation.questions import ARMS, plan
from f2l_vllm.evaluation.sources import manifest_questions, world_questions
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.phrases import CAPTION, QUESTION_TYPES, UNSEEN
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.video.probe import probe
from tests.support.videos import write_video


def test_the_world_asks_one_question_of_each_type_about_each_video(tmp_path):
    asked = world_questions("held-out", 2, 7, tmp_path)
    assert [clip.id for clip in asked.clips] == ["videos/held-out-7-0000.mp4", "videos/held-out-7-0001.mp4"]
    for clip, scene in zip(asked.clips, sample_scenes(2, 7, "held-out"), strict=True):
        assert [question.type for question in clip.questions] == [*QUESTION_TYPES, CAPTION]
        assert clip.questions[-1].truth == phrases.caption(scene)
        assert clip.source == clip.id
        assert probe(tmp_path / clip.id).frame_count > 0
    assert asked.apart == {CAPTION}
    sizes = {(probe(clip.path).width, probe(clip.path).height) for clip in asked.clips}
    assert len(sizes) == 2


def test_the_same_seed_gives_the_same_videos_and_questions(tmp_path):
    first = world_questions("held-out", 1, 7, tmp_path / "one")
    kept = {clip.path: clip.path.stat().st_mtime_ns for clip in first.clips}
    again = world_questions("held-out", 1, 7, tmp_path / "one")
    assert again == first
    assert {clip.path: clip.path.stat().st_mtime_ns for clip in again.clips} == kept
    other = world_questions("held-out", 1, 7, tmp_path / "two")
    assert [clip.path.read_bytes() for clip in other.clips] == [clip.path.read_bytes() for clip in first.clips]
    assert world_questions("held-out", 1, 8, tmp_path / "two").clips[0].questions != first.clips[0].questions


def test_unseen_phrasings_are_those_kept_out_of_training(tmp_path):
    asked = world_questions("held-out", 1, 7, tmp_path, phrasing="unseen")
    seen = {question.type: question.text for question in asked.clips[0].questions}
    assert seen["count"] == UNSEEN["count"]
    assert seen["background"] == UNSEEN["background"]
    assert asked.identity["phrasing"] == "unseen"


@pytest.mark.parametrize(
    ("split", "videos", "phrasing", "message"),
    [
        ("test", 1, "seen", "unknown split 'test'"),
        ("train", 0, "seen", "at least 1"),
        ("train", 1, "new", "unknown phrasing 'new'"),
    ],
)
def test_what_the_world_has_not_is_refused(split, videos, phrasing, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        world_questions(split, videos, 0, tmp_path, phrasing=phrasing)


def manifest(folder: Path, *rows: dict) -> Path:
    common = {"prompt": "What is it?", "target_text": "Red.", "task_type": "qa", "dataset": "mine", "split": "test"}
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps({"id": str(i)} | common | row) + "\n" for i, row in enumerate(rows)))
    return path


def test_a_manifest_groups_its_questions_by_video(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames=20)
    path = manifest(
        tmp_path,
        {"video_path": "a.mp4"},
        {"video_path": "b.mp4", "task_type": "caption"},
        {"video_path": "a.mp4", "prompt": "Where?"},
        {"video_path": "a.mp4", "split": "train"},
    )
    asked = manifest_questions(path, tmp_path / "work", split="test")
    assert [[question.id for question in clip.questions] for clip in asked.clips] == [["0", "2"], ["1"]]
    assert asked.clips[0].path == tmp_path / "a.mp4"
    assert asked.metric == "f1"
    assert (asked.apart, asked.skipped) == (frozenset(), ())


def test_a_span_is_watched_alone(tmp_path):
    write_video(tmp_path / "a.mp4", frames=40, fps=10)
    path = manifest(tmp_path, {"video_path": "a.mp4"}, {"video_path": "a.mp4", "metadata": {"start": 1, "end": 3}})
    whole, span = manifest_questions(path, tmp_path / "work").clips
    assert probe(span.path).frame_count == 20
    assert span.id.startswith("videos/")
    assert span.source == whole.source
    with pytest.raises(ValueError, match="two different videos"):  # both are of one video
        plan((whole, span), ARMS)


def test_what_cannot_be_asked_is_left_out_with_its_reason(tmp_path):
    write_video(tmp_path / "a.mp4", frames=20)
    path = manifest(
        tmp_path, {"video_path": "a.mp4"}, {"video_path": "gone.mp4"}, {"video_path": "a.mp4", "target_text": ""}
    )
    asked = manifest_questions(path, tmp_path / "work")
    assert [question.id for clip in asked.clips for question in clip.questions] == ["0"]
    reasons = sorted(one.reason for one in asked.skipped)
    assert reasons[0] == "2: no target_text to compare answers with"
    assert "gone.mp4" in reasons[1]


def test_a_manifest_with_nothing_to_ask_is_refused(tmp_path):
    path = manifest(tmp_path, {"video_path": "gone.mp4"})
    with pytest.raises(ValueError, match=r"no example to ask about.*gone\.mp4"):
        manifest_questions(path, tmp_path / "work")


def test_every_question_is_planned_in_every_arm(tmp_path):
    names = ("a.mp4", "b.mp4", "c.mp4")
    for name in names:
        write_video(tmp_path / name, frames=2)
    rows = [{"video_path": name, "prompt": prompt} for name in names for prompt in ("What?", "Where?")]
    clips = manifest_questions(manifest(tmp_path, *rows), tmp_path / "work").clips
    asks = plan(clips, ARMS)
    assert len(asks) == 3 * 2 * 4
    reads = {(ask.arm, ask.clip.id): ask.reads and ask.reads.id for ask in asks}
    assert reads["adapter", clips[0].id] == reads["frames", clips[0].id] == clips[0].id
    assert reads["none", clips[0].id] is None
    assert [reads["wrong-video", clip.id] for clip in clips] == [clips[1].id, clips[2].id, clips[0].id]
    with pytest.raises(ValueError, match="unknown arm 'best'"):
        plan(clips, ["best"])
