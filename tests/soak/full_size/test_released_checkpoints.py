"""Checkpoints of the released shapes and file format, with random weights, from the file to a served token.

Slow and large (the larger needs 15 GB of memory and 10 GB of disk), so `make test-full-size` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from f2l_vllm.base_models.registry import DEFAULT
from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.bench.hypernetwork_shapes import SHAPES, Shape, random_hypernetwork, save_model, save_released
from f2l_vllm.client import upload
from f2l_vllm.hypernetwork.config_file import read_config
from f2l_vllm.hypernetwork.fit import check_fit
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.hypernetwork.peft_format import validate_adapter
from f2l_vllm.recipes.f2l_tiny.checkpoint import CHAT_TEMPLATE
from f2l_vllm.recipes.f2l_tiny.tokenizer import build_tokenizer
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes
from tests.support.server import Server

pytestmark = pytest.mark.full_size

FRAMES = 12


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def model(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random SmolVLM of the shape in bf16, removed again: it takes gigabytes."""
    import shutil

    directory = save_model(shape, tmp_path_factory.mktemp("model"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def released(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hyper = random_hypernetwork(shape.hypernetwork, torch.bfloat16)
    return save_released(hyper, tmp_path_factory.mktemp("released") / "hypernetwork.pt")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mp4(sample_scenes(1, seed=1)[0], tmp_path_factory.mktemp("video") / "video.mp4", seconds=FRAMES)


def test_the_safe_reader_gives_every_weight_and_the_shape_of_the_file(shape: Shape, released: Path) -> None:
    # A released file does not say how videos were sampled in training; that is known of all of them.
    assert read_config(released) == replace(shape.hypernetwork, max_frames=FRAMES, longest_edge=384)
    written = random_hypernetwork(shape.hypernetwork, torch.bfloat16).state_dict()
    read = Hypernetwork.load(released).state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name].bfloat16(), tensor) for name, tensor in written.items())


def test_the_other_sizes_hypernetwork_is_refused_by_name(shape: Shape) -> None:
    with torch.device("meta"):
        _, model = DEFAULT.random_model(shape.model, build_tokenizer(), CHAT_TEMPLATE)
    model.config._name_or_path = shape.hypernetwork.base_model
    check_fit(model, shape.hypernetwork)
    other = next(other for other in SHAPES.values() if other is not shape)
    with pytest.raises(ValueError, match=shape.hypernetwork.base_model) as refused:
        check_fit(model, other.hypernetwork)
    assert other.hypernetwork.base_model in str(refused.value)


def test_a_video_becomes_an_adapter_of_the_released_rank(
    shape: Shape, model: Path, released: Path, video: Path, tmp_path: Path
) -> None:
    internalizer = Internalizer.load(model, released)
    adapter = internalizer.internalize(video)
    assert adapter.info.frames == FRAMES
    assert adapter.info.visual_tokens == FRAMES * shape.model.tokens_per_frame
    adapter.save(tmp_path / "adapter", base_model=str(model))
    files = validate_adapter(tmp_path / "adapter", BaseShapes.read(model), max_rank=32)
    assert files.rank == 32
    sizes = shape.hypernetwork.modules["down_proj"]
    assert files.bytes == pytest.approx(2 * 32 * sum(sizes) * shape.hypernetwork.num_layers, rel=0.01)


def test_a_question_is_answered_under_the_adapter(model: Path, released: Path, video: Path, tmp_path: Path) -> None:
    flags = ["--hypernetwork", str(released), "--dtype", "bfloat16", "--max-model-len", "2048"]
    flags += ["--kv-cache-memory-bytes", "600000000"]
    server = Server(model, tmp_path / "home", *flags)
    try:
        server.wait_ready()
        client = server.client
        [file] = upload(client, video)

        def first_token(name: str) -> tuple[str, float, int]:
            answer = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "What happens in the video?"}],
                max_completion_tokens=1,
                temperature=0,
                logprobs=True,
            )
            assert answer.usage is not None
            token = answer.choices[0].logprobs.content[0]
            return token.token, token.logprob, answer.usage.prompt_tokens

        under_adapter, alone = first_token(file.id), first_token("base")
        assert under_adapter[2] == alone[2] < 32, "no visual token in the prompt"
        assert under_adapter[:2] != alone[:2]
    finally:
        server.stop()
