"""What is counted is what would be measured: prompts as the processor writes them, adapters as they are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers.video_utils import VideoMetadata

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.bench import shapes, tokenizer
from f2l_vllm.bench.costs import Costs, write_adapter
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.hypernetwork.peft_format import validate_adapter
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes

QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def subject() -> shapes.Subject:
    return shapes.of_shape(shapes.TINY, Path("unused"))


@pytest.fixture(scope="module")
def costs(subject: shapes.Subject) -> Costs:
    return Costs(subject)


@pytest.mark.parametrize("frames", [1, 4, 8])
def test_prompt_tokens_are_those_of_the_processor(costs: Costs, frames: int) -> None:
    processor = costs.processor
    metadata = VideoMetadata(total_num_frames=frames, fps=1, duration=frames, frames_indices=list(range(frames)))
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    video = np.zeros((frames, 32, 32, 3), dtype=np.uint8)
    given = {"video_metadata": [[metadata]], "do_sample_frames": False, "return_tensors": "pt"}
    ids = processor(text=inputs, videos=[[video]], **given)["input_ids"].tolist()
    assert costs.prompt_tokens(QUESTION, frames) == len(ids[0])
    image = processor.image_token_id
    assert costs.visual_tokens(frames) == sum(token == image for token in ids[0])


def test_a_question_alone_has_no_visual_token(costs: Costs) -> None:
    assert costs.visual_tokens(0) == 0
    assert costs.prompt_tokens(QUESTION) < costs.prompt_tokens(QUESTION, 1) - costs.visual_tokens(1)


def test_kv_bytes_are_keys_and_values_of_every_layer(costs: Costs) -> None:
    # f2l-tiny: 4 layers, 2 heads of keys and of values, 32 numbers each, in fp32 on a CPU.
    assert costs.kv_bytes_per_token == 4 * 2 * 2 * 32 * 4
    assert costs.kv_bytes(8) == 8 * 4 * costs.kv_bytes_per_token


def test_adapter_bytes_are_those_of_a_published_one(costs: Costs, subject: shapes.Subject, tmp_path: Path) -> None:
    video = write_mp4(sample_scenes(1, 1)[0], tmp_path / "video.mp4", fps=1, seconds=4)
    internalizer = Internalizer.load(subject.directory, subject.hypernetwork)
    internalizer.internalize(video).save(tmp_path / "adapter", subject.model)
    files = validate_adapter(tmp_path / "adapter", BaseShapes.read(subject.directory))
    assert (files.rank, files.bytes) == (costs.rank, costs.adapter_bytes)


def test_random_adapters_can_be_served_and_differ(subject: shapes.Subject, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_adapter(subject, tmp_path / str(seed), rank=8, seed=seed)
        assert validate_adapter(tmp_path / str(seed), BaseShapes.read(subject.directory)).rank == 8
    contents = [(tmp_path / str(seed) / "adapter_model.safetensors").read_bytes() for seed in (0, 1)]
    assert contents[0] != contents[1]


def test_a_tokenizer_of_the_released_size_splits_as_theirs_and_writes_every_id() -> None:
    made = tokenizer.build(49280, ["What colour is the square?"])
    assert len(made) == 49280
    words = ["User", ":", "ĠWhat", "Ġcolour", "Ġis", "Ġthe", "Ġsquare", "?"]
    assert made.tokenize("User: What colour is the square?") == words
    stamp = "\nFrame from 00:17:<fake_token_around_image><global-img><image>"
    assert made.tokenize(stamp)[:10] == ["Ċ", "Frame", "Ġfrom", "Ġ", "0", "0", ":", "1", "7", ":"]
    assert all(made.decode([token]) for token in range(49280))
    assert made.tokenize("an unheard-of word")  # whatever bytes there are


def test_no_such_shape_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"tiny, 500m, 2\.2b"):
        shapes.of_shape("7b", Path("unused"))
