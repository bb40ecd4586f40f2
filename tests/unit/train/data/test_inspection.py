"""Bad videos of a manifest are found, with a reason, before anything is trained on it."""

import os
import signal
from pathlib import Path

import pytest

from f2l_vllm.train.data.inspection import Rejection, inspect_examples
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.video.decoder import IsolatedDecoder
from f2l_vllm.video.probe import Limits
from tests.support.videos import write_audio, write_video


def about(name: str, video: Path, start: float | None = None, end: float | None = None) -> Example:
    metadata = {} if start is None else {"start": start, "end": end}
    return Example(name, video, "What happens?", "", "caption", "test", "train", metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six files: one good, five that are not."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "good.mp4", frames=50, fps=10)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video at all")
    write_audio(folder / "sound.mp4")
    cut = write_video(folder / "cut.mp4", frames=300, container_options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    write_video(folder / "tiny.mp4", size=(16, 16))
    return folder


def test_every_bad_video_and_span_gets_its_reason(folder):
    good, missing = folder / "good.mp4", folder / "missing.mp4"
    examples = [
        about("whole", good),
        about("empty", folder / "empty.mp4"),
        about("span", good, 1, 4),
        about("text-1", folder / "text.mp4"),
        about("late", good, 4, 6),
        about("sound", folder / "sound.mp4"),
        about("missing", missing),
        about("text-2", folder / "text.mp4", 0, 1),
        about("cut", folder / "cut.mp4"),
        about("tiny", folder / "tiny.mp4"),
    ]
    calls = []
    usable, bad = inspect_examples(examples, Limits(min_side=32), lambda *counts: calls.append(counts))
    assert [example.id for example in usable] == ["whole", "span"]
    assert calls == [(done, 7) for done in range(1, 8)]  # every file once
    found = {rejection.ids: rejection.reason.split(":")[0] for rejection in bad}
    assert found == {
        ("empty",): "empty_file",
        ("text-1", "text-2"): "not_a_video",
        ("late",): "span_outside_video",
        ("sound",): "no_video_stream",
        ("missing",): "file_not_found",
        ("cut",): "truncated_video",
        ("tiny",): "video_too_small",
    }
    assert bad[1].to_row() == {
        "video": str(folder / "text.mp4"),
        "ids": ["text-1", "text-2"],
        "reason": "not_a_video: The file is not a video in a known format; upload an mp4, mov, webm, mkv or avi file.",
    }


class Standing(IsolatedDecoder):
    """Its process never answers."""

    def _running(self):
        process = super()._running()
        os.kill(process.pid, signal.SIGSTOP)
        return process


def test_a_file_that_hangs_its_reader_is_left_out(tmp_path, monkeypatch):
    from f2l_vllm.train.data import inspection

    video = write_video(tmp_path / "good.mp4")
    monkeypatch.setattr(inspection, "INSPECT_SECONDS", 0.1)
    monkeypatch.setattr(inspection, "IsolatedDecoder", Standing)
    (_, (rejection,)) = inspect_examples([about("slow", video)])
    assert rejection == Rejection(video, ("slow",), rejection.reason)
    assert "in reasonable time and memory" in rejection.reason
