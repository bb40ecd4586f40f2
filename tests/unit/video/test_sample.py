"""What is sampled is what transformers' own processor samples and decodes from the same file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers import AutoProcessor, SmolVLMProcessor
from transformers.video_utils import load_video

from f2l_vllm.hypernetwork.config import INSTRUCTION
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.video.sample import Sampling, sample_video
from tests.support.videos import hide_first_second, write_video


@pytest.fixture(scope="module")
def processor(smolvlm_dir: Path) -> SmolVLMProcessor:
    return AutoProcessor.from_pretrained(smolvlm_dir)


@pytest.fixture
def decoding_processor(processor: SmolVLMProcessor, monkeypatch: pytest.MonkeyPatch) -> SmolVLMProcessor:
    """The same processor, whose own file decoding goes through transformers' PyAV reader instead of torchcodec's."""

    def fetch(videos: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(videos, list):
            return list(zip(*[fetch(video, sample_indices_fn) for video in videos], strict=True))
        return load_video(videos, backend="pyav", sample_indices_fn=sample_indices_fn)

    monkeypatch.setattr(processor.video_processor, "fetch_videos", fetch)
    return processor


class AnyModel(torch.nn.Module):
    """Preparing inputs needs no model, only something with text layers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="smolvlm")
        self.text_model = torch.nn.Module()
        self.text_model.layers = torch.nn.ModuleList()


VIDEOS: dict[str, dict[str, Any]] = {
    "six seconds": {"frames": 60, "fps": 10, "options": {"bf": "2", "g": "15"}},
    "half a second": {"frames": 5, "fps": 10},
    "one frame": {"frames": 1, "fps": 10},
    "more than a minute": {"frames": 150, "fps": 2, "options": {"g": "20"}},
    "fractional rate": {"frames": 50, "fps": 7},
    "portrait, odd size": {"frames": 20, "fps": 5, "size": (47, 63), "pixel_format": "yuv444p"},
    "variable rate": {"frames": 20, "times": [i * i * 10 for i in range(20)]},
}


@pytest.mark.parametrize("options", VIDEOS.values(), ids=VIDEOS.keys())
def test_indices_timestamps_tokens_and_pixels_equal_the_processors_own(
    options: dict[str, Any], decoding_processor: SmolVLMProcessor, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "video.mp4", **options)
    conversation = [
        {
            "role": "user",
            "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": INSTRUCTION}],
        }
    ]
    own = decoding_processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"return_metadata": True}
    )
    sampled = sample_video(path, decoding_processor)
    ours = VideoEncoder(AnyModel(), decoding_processor).prepare(sampled)
    assert torch.equal(ours["input_ids"], own["input_ids"])
    assert torch.equal(ours["attention_mask"], own["attention_mask"])
    assert torch.equal(ours["pixel_values"], own["pixel_values"])
    sampler = decoding_processor.video_processor
    frames, metadata = load_video(
        str(path),
        backend="pyav",
        sample_indices_fn=lambda metadata, **_: sampler.sample_frames(metadata, sampler.num_frames, sampler.fps),
    )
    np.testing.assert_array_equal(sampled.metadata.frames_indices, metadata.frames_indices)
    np.testing.assert_array_equal(sampled.frames, frames)
    assert sampled.timestamps == metadata.timestamps
    for name in ("total_num_frames", "fps", "duration", "width", "height"):
        assert sampled.metadata[name] == metadata[name], name


def test_sampling_can_ask_for_fewer_frames_or_another_rate(processor: SmolVLMProcessor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", frames=60, fps=10)
    assert len(sample_video(path, processor).frames) == 6
    assert len(sample_video(path, processor, sampling=Sampling(max_frames=3)).frames) == 3
    faster = sample_video(path, processor, sampling=Sampling(max_frames=20, fps=2.0))
    assert len(faster.frames) == 12
    assert faster.timestamps[0] == 0.0
    assert faster.timestamps[-1] == pytest.approx(5.9)


def test_a_trimmed_video_is_sampled_where_it_is_shown(processor: SmolVLMProcessor, tmp_path: Path) -> None:
    path = hide_first_second(write_video(tmp_path / "v.mp4", frames=40, fps=10, options={"bf": "2", "g": "15"}))
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 30
    sampled = sample_video(path, processor)
    assert (sampled.info.frame_count, sampled.info.duration_s) == (30, pytest.approx(3.0))
    np.testing.assert_array_equal(sampled.frames, np.stack(shown)[sampled.metadata.frames_indices])


def test_a_container_without_a_frame_count_is_sampled_to_its_end(processor: SmolVLMProcessor, tmp_path: Path) -> None:
    sampled = sample_video(write_video(tmp_path / "v.webm", frames=40, codec="libvpx"), processor)
    assert sampled.metadata.total_num_frames == 40
    assert list(sampled.metadata.frames_indices)[-1] == 39
