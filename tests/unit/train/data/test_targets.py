"""Target answers: written by the real shipped model, in this process or in one that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm import models
from f2l_vllm.cli.main import app
from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import FRAMES, Ask, Clip, Question
from f2l_vllm.train.data.manifest import Example, read_manifest, write_manifest
from f2l_vllm.train.data.targets import Shard, partial_path, write_targets
from f2l_vllm.train.data.teacher import LocalTeacher, TeacherAnswer, TeacherError
from f2l_vllm.train.data.world_manifest import write_world
from f2l_vllm.video.reading import ReadingOptions
from f2l_vllm.video.sample import Sampling

NAME = models.DEFAULT_MODEL


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A manifest of ten videos, three questions each."""
    folder = tmp_path_factory.mktemp("world")
    return write_world(folder, videos=10, seed=11, split="held-out", questions_per_video=3)[0]


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher.load(models.resolve(NAME), NAME, max_tokens=40)


@pytest.fixture(scope="module")
def answered(world, teacher, tmp_path_factory) -> Path:
    """All targets, written without a break."""
    output = tmp_path_factory.mktemp("out") / "targets.jsonl"
    write_targets(world, output, teacher)
    return output


def test_the_answers_are_the_models_with_the_frames_in_context(world, answered):
    reference = TransformersAnswers(NAME, None, ReadingOptions(), max_tokens=40)
    before, after = read_manifest(world), read_manifest(answered)
    assert [example.id for example in after] == [example.id for example in before]
    for first in range(0, len(before), 3):
        some = before[first : first + 3]
        questions = [Question(e.id, e.prompt, e.target_text, e.task_type, e.dataset) for e in some]
        clip = Clip(some[0].id, some[0].video_path, some[0].id, tuple(questions))
        expected: list[str] = []
        asks = [Ask(clip, question, FRAMES, clip) for question in questions]
        reference.answer(asks, lambda _, reply: expected.append(reply.text), pytest.fail)  # noqa: B023
        assert [example.target_text for example in after[first : first + 3]] == expected
    right = sum(a.target_text == b.target_text for a, b in zip(after, before, strict=True))
    assert right > len(before) * 0.7  # without the frames it would be a third


def test_metadata_says_who_answered_and_what_was_there(world, answered):
    for before, after in zip(read_manifest(world), read_manifest(answered), strict=True):
        assert after.metadata["teacher"] == {
            "model": NAME,
            "max_tokens": 40,
            "max_frames": None,
            "fps": None,
            "finish_reason": "stop",
        }
        assert after.metadata["original_target_text"] == before.target_text
        assert after.metadata["scene"] == before.metadata["scene"]
        assert after.video_path == before.video_path


def test_a_span_is_answered_from_its_own_frames(tmp_path, world, teacher):
    example = next(one for one in read_manifest(world) if one.metadata["seconds"] >= 6)
    clips = [(0, 2), (2, 4), (0, 2)]
    spans = [
        Example(f"{n}", example.video_path, "Describe the video.", "", "caption", "d", "train", {"start": a, "end": b})
        for n, (a, b) in enumerate(clips)
    ]
    write_manifest(tmp_path / "m.jsonl", spans)
    asked = []

    class Listening(LocalTeacher):
        def answer(self, examples):
            asked.append([one.id for one in examples])
            return super().answer(examples)

    listening = Listening.load(models.resolve(NAME), NAME, max_tokens=40, sampling=Sampling(max_frames=4))
    done, _ = write_targets(tmp_path / "m.jsonl", tmp_path / "out.jsonl", listening)
    assert sorted(asked) == [["0", "2"], ["1"]]  # one encoding a clip
    assert done[0].target_text == done[2].target_text


def test_an_answer_that_is_cut_off_says_so(tmp_path, world):
    short = LocalTeacher.load(models.resolve(NAME), NAME, max_tokens=1)
    done, _ = write_targets(world, tmp_path / "out.jsonl", short, Shard(0, 10))
    assert {example.metadata["teacher"]["finish_reason"] for example in done} == {"length"}


def test_the_shards_together_are_the_whole(world, answered, teacher, tmp_path):
    parts = []
    for index in range(4):
        part, _ = write_targets(world, tmp_path / f"{index}.jsonl", teacher, Shard(index, 4))
        parts.append(part)
    videos = [{example.video_path for example in part} for part in parts]
    assert [len(some) for some in videos] == [3, 3, 2, 2]
    joined = tmp_path / "all.jsonl"
    joined.write_bytes(b"".join((tmp_path / f"{index}.jsonl").read_bytes() for index in range(4)))
    by_id = {example.id: example.target_text for example in read_manifest(joined)}
    assert by_id == {example.id: example.target_text for example in read_manifest(answered)}


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "a/b", "0/0", "0/4/2"])
def test_a_bad_shard_says_how_it_is_written(text):
    with pytest.raises(ValueError, match="A shard is i/n with 0 <= i < n, such as 0/4"):
        Shard.parse(text)


def words(world: Path, output: Path) -> list[str]:
    return ["targets", str(world), "-o", str(output), "--max-tokens", "40"]


def test_a_run_that_is_killed_goes_on_where_it_was(world, answered, tmp_path):
    output = tmp_path / "targets.jsonl"
    partial = partial_path(output)
    command = [sys.executable, "-m", "f2l_vllm.cli", *words(world, output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    kept = partial.read_bytes()
    assert 3 < kept.count(b"\n") < 31
    with partial.open("ab") as file:  # what a kill in the middle of a line leaves
        file.write(b'{"id": "held-out-11-0000')
    run = CliRunner().invoke(app, words(world, output))
    assert run.exit_code == 0, run.output
    assert not partial.exists()
    assert output.read_bytes() == answered.read_bytes()


class Counting:
    """A teacher that counts, and gives up after some clips."""

    concurrency = 1

    def __init__(self, patience: int = 1000) -> None:
        self.settings = {"model": "counting", "max_tokens": 1}
        self.asked: list[str] = []
        self.patience = patience

    def answer(self, examples):
        if len(self.asked) >= self.patience:
            raise TeacherError("out of patience")
        self.asked += [example.id for example in examples]
        return [TeacherAnswer("" if example.id.endswith("caption") else "Yes.", "stop") for example in examples]


def test_what_a_teacher_has_answered_is_never_asked_again(world, tmp_path):
    output = tmp_path / "out.jsonl"
    impatient = Counting(patience=4)
    with pytest.raises(TeacherError, match="out of patience"):
        write_targets(world, output, impatient)
    assert not output.exists()
    patient, calls = Counting(), []
    _, rejections = write_targets(world, output, patient, on_progress=lambda *counts: calls.append(counts))
    silent = {name for rejection in rejections for name in rejection.ids}
    assert all(name.endswith("caption") for name in silent)
    assert set(impatient.asked) & set(patient.asked) <= silent  # an empty answer is asked for again
    assert len(set(impatient.asked) | set(patient.asked)) == 30
    assert calls[0][0] == len(set(impatient.asked) - silent)
    assert calls[-1] == (30, 30)


def test_a_run_is_not_gone_on_with_under_other_settings(world, tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(TeacherError):
        write_targets(world, output, Counting(patience=1))
    other = Counting()
    other.settings["max_tokens"] = 2
    with pytest.raises(ValueError, match=r"was begun with other settings \(max_tokens 1, now 2\); go on with those"):
        write_targets(world, output, other)
    with pytest.raises(ValueError, match=r"shard '0/1', now '1/2'"):
        write_targets(world, output, Counting(), Shard(1, 2))


def test_an_output_that_exists_is_not_written_over(world, answered, teacher):
    before = answered.read_bytes()
    with pytest.raises(ValueError, match=r"exists already; name another file, or delete it"):
        write_targets(world, answered, teacher)
    run = CliRunner().invoke(app, ["targets", str(world), "-o", str(answered)])
    assert run.exit_code == 2
    assert answered.read_bytes() == before


def test_two_processes_do_not_write_one_file(world, tmp_path):
    class Meddling(Counting):
        def answer(self, examples):
            with pytest.raises(ValueError, match="is being written by another process"):
                write_targets(world, tmp_path / "out.jsonl", Counting())
            return super().answer(examples)

    assert len(write_targets(world, tmp_path / "out.jsonl", Meddling())[0]) > 0


def test_bad_videos_and_spans_are_left_out_with_a_reason(world, teacher, tmp_path):
    good = read_manifest(world)[0]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(good.video_path.read_bytes()[:800])
    examples = [
        good,
        Example("broken", broken, "What?", "", "caption", "d", "train"),
        Example("gone", tmp_path / "gone.mp4", "What?", "", "caption", "d", "train"),
        Example("late", good.video_path, "What?", "", "caption", "d", "train", {"start": 90, "end": 95}),
    ]
    write_manifest(tmp_path / "m.jsonl", examples)
    report = tmp_path / "report.jsonl"
    flags = ["targets", str(tmp_path / "m.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--report", str(report)]
    run = CliRunner().invoke(app, flags)
    assert run.exit_code == 0, run.output
    assert [example.id for example in read_manifest(tmp_path / "out.jsonl")] == [good.id]
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    reasons = {row["ids"][0]: row["reason"].split(":")[0] for row in rows}
    assert reasons == {"broken": "truncated_video", "gone": "file_not_found", "late": "span_outside_video"}
    assert "left out: 1 x truncated_video" in run.output
