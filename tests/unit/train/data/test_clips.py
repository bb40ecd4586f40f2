"""Spans of real video files, read as files of their own would be."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor

from f2l_vllm.train.data.clips import UnusableVideoError, clip_file, open_example
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.video.sample import Sampling, sample_video
from tests.support.videos import rotate_clockwise, write_video


@pytest.fixture(scope="module")
def processor(smolvlm_dir):
    return AutoProcessor.from_pretrained(smolvlm_dir)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """20 s at 10 frames/s, a key frame every 2.5 s, every frame kept exactly."""
    options = {"qp": "0", "g": "25"}
    return write_video(tmp_path_factory.mktemp("clips") / "long.mp4", frames=200, fps=10, options=options)


def about(video: Path, start: float | None = None, end: float | None = None) -> Example:
    metadata = {} if start is None else {"start": start, "end": end}
    return Example("one", video, "What happens?", "", "caption", "test", "train", metadata)


def test_without_a_span_the_whole_video_is_sampled(processor, video):
    opened, whole = open_example(about(video), processor), sample_video(video, processor)
    assert np.array_equal(opened.frames, whole.frames)
    assert opened.metadata == whole.metadata


@pytest.mark.parametrize("span", [(0, 5), (3.3, 10.1), (12.5, 20)])
def test_a_span_is_read_as_a_video_cut_there(processor, video, span):
    first, end = round(span[0] * 10), round(span[1] * 10)
    clip = open_example(about(video, *span), processor)
    alone = write_video(video.parent / f"{end - first}.mp4", frames=end - first, fps=10)
    expected = sample_video(alone, processor)
    assert clip.metadata == expected.metadata
    assert clip.timestamps == expected.timestamps
    assert (clip.info.frame_count, clip.info.duration_s) == (expected.info.frame_count, expected.info.duration_s)
    whole = sample_video(video, processor, sampling=Sampling(max_frames=200, fps=10))
    assert len(whole.frames) == 200
    assert np.array_equal(clip.frames, whole.frames[[first + index for index in clip.metadata.frames_indices]])


def test_the_number_of_frames_and_the_rate_can_be_chosen(processor, video):
    clip = open_example(about(video, 10, 20), processor, Sampling(max_frames=3, fps=2))
    assert len(clip.frames) == 3


def test_spans_that_meet_share_no_frame(processor, video):
    every = Sampling(max_frames=200, fps=10)
    parts = [open_example(about(video, a, b), processor, every) for a, b in ((0, 7.25), (7.25, 13.0), (13.0, 20.0))]
    assert sum(len(part.frames) for part in parts) == 200
    whole = sample_video(video, processor, sampling=every)
    assert np.array_equal(np.concatenate([part.frames for part in parts]), whole.frames)


def test_a_clip_file_gives_a_server_what_the_span_gives_here(processor, video, tmp_path):
    example = about(video, 3.3, 10.1)
    file = clip_file(example, tmp_path)
    from_file, from_span = sample_video(file, processor), open_example(example, processor)
    assert from_file.metadata == from_span.metadata
    difference = np.abs(from_file.frames.astype(int) - from_span.frames.astype(int))
    neighbour = np.abs(from_span.frames[1:].astype(int) - from_span.frames[:-1].astype(int))
    assert difference.mean() < 2
    assert neighbour.mean() > 10  # what a frame taken at a wrong time would differ by
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    written = file.stat().st_mtime_ns
    assert clip_file(example, tmp_path) == file
    assert file.stat().st_mtime_ns == written
    assert clip_file(about(video), tmp_path) == video


def test_a_clip_file_of_a_phones_upright_video_of_odd_size_is_upright(processor, tmp_path):
    video = rotate_clockwise(write_video(tmp_path / "phone.mp4", frames=30, size=(50, 33), pixel_format="yuv444p"))
    example = about(video, 1, 3)
    clip = sample_video(clip_file(example, tmp_path / "clips"), processor)
    span = open_example(example, processor)
    assert clip.frames.shape == span.frames.shape
    assert clip.frames.shape[1:3] == (50, 33)
    assert np.abs(clip.frames.astype(int) - span.frames.astype(int)).mean() < 3


@pytest.mark.parametrize("span", [(15, 20.5), (25, 30), (1.01, 1.02)])
def test_a_span_outside_the_video_or_without_a_frame_is_unusable(processor, video, span, tmp_path):
    with pytest.raises(UnusableVideoError, match=r"of a video of 20\.00 s") as caught:
        open_example(about(video, *span), processor)
    assert caught.value.code == "span_outside_video"
    with pytest.raises(UnusableVideoError):
        clip_file(about(video, *span), tmp_path / "clips")
    assert list((tmp_path / "clips").glob("*")) == []


def test_a_missing_or_broken_file_is_unusable_and_says_why(processor, video, tmp_path):
    missing, text, short = tmp_path / "no.mp4", tmp_path / "text.mp4", tmp_path / "short.mp4"
    text.write_text("no video")
    short.write_bytes(video.read_bytes()[:2000])
    for path, code in ((missing, "file_not_found"), (text, "not_a_video"), (short, "truncated_video")):
        for example in (about(path), about(path, 0, 1)):
            with pytest.raises(UnusableVideoError, match=code) as caught:
                open_example(example, processor)
            assert caught.value.code == code


def test_a_video_cut_short_after_its_header_is_unusable(processor, tmp_path):
    video = write_video(tmp_path / "cut.mp4", frames=300, container_options={"movflags": "faststart"})
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(UnusableVideoError, match="truncated_video"):
        open_example(about(video, 20, 30), processor)
