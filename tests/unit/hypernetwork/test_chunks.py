"""A long video as chunk adapters composed in rank space."""

import pytest
import torch

from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.video.chunks import Chunking, cut_video
from f2l_vllm.video.reading import ReadingOptions
from tests.support.videos import write_video


@pytest.fixture(scope="module")
def internalizer(hypernetwork_model):
    return Internalizer.load(hypernetwork_model, hypernetwork_model / "hypernetwork")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("chunks") / "long.mp4", frames=300, fps=10)


def test_the_chunks_factors_stand_in_order_and_the_bias_once(internalizer, video):
    chunking = Chunking(seconds=10, max_chunks=3)
    adapter = internalizer.internalize(video, chunking=chunking)
    chunks = cut_video(video, internalizer.processor, chunking, sampling=internalizer.sampling)
    rank = internalizer.hyper.config.rank
    assert adapter.rank == 4 * rank
    assert adapter.spans == ((0.0, 10.0), (10.0, 20.0), (20.0, 30.0))
    for index in range(3):
        alone = internalizer.internalize_frames(chunks.decode(index))
        for name, (a, b) in adapter.factors.items():
            block = slice(index * rank, (index + 1) * rank)
            torch.testing.assert_close(a[:, block], alone.factors[name][0][:, :rank])
            torch.testing.assert_close(b[:, block], alone.factors[name][1][:, :rank])
    for name, (a, b) in adapter.factors.items():
        torch.testing.assert_close(a[:, 3 * rank :], internalizer.hyper.bias_A[name].detach())
        torch.testing.assert_close(b[:, 3 * rank :], internalizer.hyper.bias_B[name].detach())


def test_reading_options_cut_too(internalizer, video):
    options = ReadingOptions(max_frames=4, chunk_seconds=10, max_chunks=3)
    cutting = Internalizer(internalizer.model, internalizer.hyper, internalizer.processor, options)
    adapter = cutting.internalize(video)
    assert len(adapter.spans) == 3
    assert adapter.info.frames == 3 * 4


def test_what_is_said_of_a_chunked_video_covers_all_chunks(internalizer, video):
    info = internalizer.internalize(video, chunking=Chunking(seconds=10, max_chunks=3)).info
    assert info.spans == ((0.0, 10.0), (10.0, 20.0), (20.0, 30.0))
    assert len(info.timestamps) == info.frames
    assert list(info.timestamps) == sorted(info.timestamps)
    assert set(info.seconds) == {"decode", "vision", "text", "perceiver", "head"}


def test_one_chunk_is_the_video_in_one_pass(internalizer, video):
    chunked = internalizer.internalize(video, chunking=Chunking(seconds=60, max_chunks=1))
    whole = internalizer.internalize(video)
    for name, (a, b) in whole.factors.items():
        torch.testing.assert_close(chunked.factors[name][0], a)
        torch.testing.assert_close(chunked.factors[name][1], b)
