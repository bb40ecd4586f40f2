import re

import numpy as np
import pytest

from f2l_vllm import torch_shims

torch_shims.install()

from transformers import AutoProcessor  # noqa: E402

from f2l_vllm.video.chunks import Chunking, cut_video  # noqa: E402
from f2l_vllm.video.errors import VideoError  # noqa: E402
from f2l_vllm.video.sample import Sampling, sample_video  # noqa: E402
from tests.support.videos import write_video  # noqa: E402


@pytest.fixture(scope="module")
def processor(smolvlm_dir):
    return AutoProcessor.from_pretrained(smolvlm_dir)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """30 s at 10 frames/s."""
    return write_video(tmp_path_factory.mktemp("chunks") / "long.mp4", frames=300, fps=10)


def test_chunks_by_seconds_cover_the_video_without_overlap(processor, video):
    chunks = cut_video(video, processor, Chunking(seconds=10, max_chunks=3))
    assert chunks.spans == [(0.0, 10.0), (10.0, 20.0), (20.0, 30.0)]
    for (start, end), indices in zip(chunks.spans, chunks.indices, strict=True):
        assert all(start * 10 <= index < end * 10 for index in indices)
        assert len(indices) > 1


def test_a_chunk_is_sampled_as_a_video_of_its_own(processor, video, tmp_path):
    chunks = cut_video(video, processor, Chunking(seconds=10, max_chunks=3))
    alone = sample_video(write_video(tmp_path / "short.mp4", frames=100, fps=10), processor)
    assert [index - 100 for index in chunks.indices[1]] == list(alone.metadata.frames_indices)


def test_decoded_chunks_are_the_frames_of_the_whole_video_at_its_times(processor, video):
    chunks = cut_video(video, processor, Chunking(seconds=15, max_chunks=2))
    second = chunks.decode(1)
    assert list(second.metadata.frames_indices) == chunks.indices[1]
    assert min(second.timestamps) >= 15
    everything = sample_video(video, processor, sampling=Sampling(max_frames=300, fps=10))
    assert np.array_equal(second.frames, everything.frames[chunks.indices[1]])


def test_chunks_by_frames_hold_consecutive_frames_of_the_whole_sampling(processor, video):
    rate = processor.video_processor.fps
    chunks = cut_video(video, processor, Chunking(frames=8, max_chunks=100))
    flat = [index for indices in chunks.indices for index in indices]
    assert flat == sorted(set(flat))
    assert len(flat) == round(30 * rate)
    assert {len(indices) for indices in chunks.indices[:-1]} == {8}
    assert chunks.spans[0][0] == 0
    assert chunks.spans[-1][1] == 30


def test_a_short_rest_joins_the_last_chunk(processor, tmp_path):
    path = write_video(tmp_path / "rest.mp4", frames=201, fps=10)
    chunks = cut_video(path, processor, Chunking(seconds=10, max_chunks=2))
    assert len(chunks) == 2
    assert chunks.spans[1] == (10.0, pytest.approx(20.1))


@pytest.mark.parametrize("chunking", [Chunking(seconds=5, max_chunks=3), Chunking(frames=4, max_chunks=2)])
def test_a_video_longer_than_all_chunks_says_how_to_change_it(processor, video, chunking):
    with pytest.raises(VideoError, match=r"--chunk-\w+ \d+ or more") as error:
        cut_video(video, processor, chunking)
    assert error.value.code == "video_too_long"
    name, least = re.search(r"--chunk-(\w+) (\d+)", str(error.value)).groups()
    followed = Chunking(**{name: int(least)}, max_chunks=chunking.max_chunks)
    assert len(cut_video(video, processor, followed)) <= chunking.max_chunks


@pytest.mark.parametrize("values", [{}, {"seconds": 1, "frames": 1}, {"seconds": 0}, {"frames": 1, "max_chunks": 0}])
def test_chunkings_that_mean_nothing_are_refused(values):
    with pytest.raises(ValueError, match=r"exactly one|must be positive"):
        Chunking(**values)
