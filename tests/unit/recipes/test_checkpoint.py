"""The model directory is an ordinary SmolVLM checkpoint: processor, template and weights load and agree."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, SmolVLMForConditionalGeneration, SmolVLMProcessor
from transformers.video_utils import VideoMetadata

from f2l_vllm.recipes.f2l_tiny.checkpoint import TOKENS_PER_FRAME, build_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build_checkpoint(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def processor(directory):
    return AutoProcessor.from_pretrained(directory)


def _video(seconds: float = 8.0, fps: float = 10.0):
    total = round(seconds * fps)
    frames = np.random.default_rng(0).integers(0, 255, (total, 48, 64, 3), dtype=np.uint8)
    return frames, VideoMetadata(total_num_frames=total, fps=fps, duration=seconds, width=64, height=48)


def test_it_loads_by_name_of_the_auto_classes_and_computes(directory, processor):
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    assert isinstance(model, SmolVLMForConditionalGeneration)
    assert isinstance(processor, SmolVLMProcessor)
    frames, metadata = _video()
    inputs = processor(
        text=["<|im_start|>User: <video>Describe the video.<end_of_utterance>\nAssistant:"],
        videos=[[frames]],
        video_metadata=[[metadata]],
        do_sample_frames=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (1, 8, 3, 32, 32)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 8 * TOKENS_PER_FRAME
    assert model(**inputs).logits.isfinite().all()


def test_same_seed_same_bytes(directory, tmp_path):
    again = build_checkpoint(tmp_path, seed=3)
    files = sorted(path.name for path in directory.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert all((directory / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_the_configuration_names_what_servers_look_for(directory, processor):
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["SmolVLMForConditionalGeneration"]
    assert config["image_token_id"] == processor.image_token_id
    assert config["text_config"]["vocab_size"] == len(processor.tokenizer)
    assert config["text_config"]["eos_token_id"] == processor.tokenizer.eos_token_id
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json"):
        assert (directory / name).is_file()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hi?", " Hi?"),
        ([{"type": "text", "text": "Hi?"}], " Hi?"),
        ([], " "),
        (None, " "),
        ([{"type": "image"}, {"type": "text", "text": "Hi?"}], "<image>Hi?"),
        ([{"type": "text", "text": "Hi?"}, {"type": "image"}], " Hi?<image>"),
        ([{"type": "video"}, {"type": "text", "text": "Hi?"}], " <video>Hi?"),
    ],
)
def test_the_template_takes_every_kind_of_content(processor, content, expected):
    prompt = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == f"<|im_start|>User:{expected}<end_of_utterance>\nAssistant:"


def test_the_template_agrees_with_the_processors_own_for_videos(processor):
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Hi?"}]}
    own = processor.apply_chat_template([message], add_generation_prompt=True)  # transformers' built-in for videos
    ours = processor.tokenizer.apply_chat_template(
        [message], chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert own == ours


@pytest.mark.parametrize(("seconds", "frames"), [(0.3, 1), (1.0, 4), (2.0, 8), (10.0, 8), (90.0, 8)])
def test_eight_frames_of_anything_that_lasts_two_seconds(processor, seconds, frames):
    metadata = _video(seconds)[1]
    assert len(processor.video_processor.sample_frames(metadata)) == frames
