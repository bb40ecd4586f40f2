"""Videos for SmolVLM in vLLM: the same frames, prompt and pixels as in transformers. No engine runs here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata, load_video
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.model_executor.models.smolvlm import SmolVLMForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, get_video_loader_backend_for_processor
from vllm.multimodal.video_prune.evs import compute_retained_tokens_count
from vllm.transformers_utils.processor import get_video_processor_cls_name

from f2l_vllm.base_models.merging import tokens_of_frames
from f2l_vllm.engine import plugin
from f2l_vllm.engine.base_models import video_loader
from f2l_vllm.engine.base_models.smolvlm import SmolVLMVideoForConditionalGeneration
from f2l_vllm.engine.base_models.video_loader import NAME, SampledVideoLoader
from tests.support.checkpoints import make_smolvlm


@pytest.fixture(scope="module", params=[False, True], ids=["mark is text", "mark is a special token"])
def checkpoint(request: pytest.FixtureRequest, smolvlm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not request.param:
        return smolvlm_dir
    return make_smolvlm(tmp_path_factory.mktemp("special"), video_token_in_vocabulary=True)


@pytest.fixture(scope="module")
def hf(checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def configure(checkpoint: Path) -> Callable[..., ModelConfig]:
    plugin.register()
    return lambda **options: ModelConfig(model=str(checkpoint), dtype="float32", max_model_len=1024, **options)


@pytest.fixture
def processor(configure: Callable[..., ModelConfig]) -> BaseMultiModalProcessor:
    return MULTIMODAL_REGISTRY.create_processor(configure())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_mp4(folder / f"{frames}.mp4", frames) for frames in (24, 100, 1)]


def write_mp4(path: Path, frames: int, size: tuple[int, int] = (56, 40)) -> Path:
    picture = np.random.default_rng(frames).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            moved = np.ascontiguousarray(np.roll(picture, 3 * index, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode_in_transformers(hf: Any, path: Path) -> tuple[np.ndarray, Any]:
    sample = hf.video_processor.sample_frames
    return load_video(str(path), backend="pyav", sample_indices_fn=lambda metadata, **_: sample(metadata))


def expected_inputs(hf: Any, prompt: str, paths: list[Path], images: list[Any] | None = None) -> Any:
    videos = [decode_in_transformers(hf, path) for path in paths]
    media = {"images": images} if images else {}
    return hf(
        text=prompt,
        videos=[[frames for frames, _ in videos]],
        video_metadata=[metadata for _, metadata in videos],
        do_sample_frames=False,
        return_tensors="pt",
        **media,
    )


def process(
    processor: BaseMultiModalProcessor, prompt: str, paths: list[Path], images: list[Any] | None = None, **options: Any
) -> Any:
    data: dict[str, Any] = {"video": [SampledVideoLoader.load_bytes(path.read_bytes()) for path in paths]}
    if images:
        data["image"] = images
    return processor(prompt, processor.info.parse_mm_data(data), hf_processor_mm_kwargs=options)


def prompt_with(content: str) -> str:
    return f"<|im_start|>User: {content}<end_of_utterance>\nAssistant:"


def test_loader_takes_the_frames_that_transformers_takes(
    processor: BaseMultiModalProcessor, hf: Any, clips: list[Path]
) -> None:
    for path in clips:
        expected, metadata = decode_in_transformers(hf, path)
        frames, given = SampledVideoLoader.load_bytes(path.read_bytes(), num_frames=32)
        assert np.array_equal(frames, expected)
        assert given["frames_indices"] == list(metadata.frames_indices)
        for name in ("fps", "duration", "total_num_frames"):
            assert given[name] == pytest.approx(metadata[name])


def test_loader_can_be_told_to_sample_otherwise(processor: BaseMultiModalProcessor, clips: list[Path]) -> None:
    frames, metadata = SampledVideoLoader.load_bytes(clips[1].read_bytes(), max_frames=3)
    assert len(frames) == len(metadata["frames_indices"]) == 3


def test_loader_says_what_is_wrong_with_a_file(processor: BaseMultiModalProcessor) -> None:
    with pytest.raises(ValueError, match="not a video"):
        SampledVideoLoader.load_bytes(b"not a video at all")


def test_loader_without_a_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampledVideoLoader, "_processor", None)
    with pytest.raises(ValueError, match="does not take videos"):
        SampledVideoLoader.load_bytes(b"")


def test_vllm_chooses_the_loader_for_the_model(configure: Callable[..., ModelConfig]) -> None:
    video_processor = get_video_processor_cls_name(configure())
    assert get_video_loader_backend_for_processor(video_processor) == NAME
    assert isinstance(VIDEO_LOADER_REGISTRY.load(NAME), SampledVideoLoader)


@pytest.mark.parametrize(
    "content", ["<video>What?", "Look: <video> What?", "<video>", "a<video>\n\nb", "<video>\nWhy?"]
)
def test_prompt_and_pixels_equal_those_of_transformers(
    processor: BaseMultiModalProcessor, hf: Any, clips: list[Path], content: str
) -> None:
    expected = expected_inputs(hf, prompt_with(content), clips[:1])
    given = process(processor, prompt_with(content), clips[:1])
    assert given["prompt_token_ids"] == expected["input_ids"][0].tolist()
    pixels = given["mm_kwargs"]["video"][0].get_data()
    assert torch.equal(pixels["pixel_values_videos"], expected["pixel_values"][0])
    assert pixels["pixel_attention_mask_videos"].dtype == torch.bool  # a byte a pixel
    assert torch.equal(pixels["pixel_attention_mask_videos"], expected["pixel_attention_mask"][0].bool())


def test_placeholders_hold_one_embedding_per_image_token(
    processor: BaseMultiModalProcessor, hf: Any, clips: list[Path]
) -> None:
    given = process(processor, prompt_with("<video>one <video>two"), [clips[0], clips[2]])
    image_token = hf.image_token_id
    ids = given["prompt_token_ids"]
    placeholders = given["mm_placeholders"]["video"]
    assert [placeholder.get_num_embeds() for placeholder in placeholders] == [2 * 4, 1 * 4]
    assert sum(placeholder.get_num_embeds() for placeholder in placeholders) == ids.count(image_token)
    for placeholder in placeholders:
        part = ids[placeholder.offset : placeholder.offset + placeholder.length]
        assert [token == image_token for token in part] == placeholder.is_embed.tolist()


def test_images_and_videos_mix(processor: BaseMultiModalProcessor, hf: Any, clips: list[Path]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    prompt = prompt_with("<image>then <video>What?")
    given = process(processor, prompt, clips[:1], [image])
    written = hf(text=prompt.replace("<video>", ""), images=[[image]], return_tensors="pt")
    assert {name: len(items) for name, items in given["mm_placeholders"].items()} == {"image": 1, "video": 1}
    assert torch.equal(given["mm_kwargs"]["image"][0].get_data()["pixel_values"], written["pixel_values"][0])
    assert given["prompt_token_ids"].count(hf.image_token_id) == 5 * 4 + 2 * 4


def test_resolution_can_be_set_as_in_transformers(
    processor: BaseMultiModalProcessor, hf: Any, clips: list[Path]
) -> None:
    frames, _ = decode_in_transformers(hf, clips[0])
    size = {"longest_edge": 16}
    expected = hf.video_processor(videos=[frames], size=size, do_sample_frames=False, return_tensors="pt")
    given = process(processor, prompt_with("<video>"), clips[:1], videos_kwargs={"size": size})
    assert torch.equal(given["mm_kwargs"]["video"][0].get_data()["pixel_values_videos"], expected["pixel_values"][0])


def test_frames_resized_as_they_come_give_the_very_same_pixels(
    processor: BaseMultiModalProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all shapes: wide, high, smaller than the model's square, and odd."""
    for index, (width, height) in enumerate([(640, 360), (202, 398), (16, 18), (130, 126)]):
        path = write_mp4(tmp_path / f"{index}.mp4", 24, (width, height))
        expected = process(processor, prompt_with("<video>"), [path])
        with monkeypatch.context() as small:
            small.setattr(video_loader, "WHOLE_BYTES", 0)
            frames, metadata = SampledVideoLoader.load_bytes(path.read_bytes())
            given = process(processor, prompt_with("<video>"), [path])
        assert metadata["resized"]
        assert frames.nbytes < 100_000
        assert given["prompt_token_ids"] == expected["prompt_token_ids"]
        pixels, others = (each["mm_kwargs"]["video"][0].get_data() for each in (given, expected))
        assert torch.equal(pixels["pixel_values_videos"], others["pixel_values_videos"])
        assert torch.equal(pixels["pixel_attention_mask_videos"], others["pixel_attention_mask_videos"])


def test_frames_that_were_resized_are_not_asked_for_otherwise(
    processor: BaseMultiModalProcessor, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_loader, "WHOLE_BYTES", 0)
    with pytest.raises(ValueError, match="leave out mm_processor_kwargs"):
        process(processor, prompt_with("<video>"), clips[:1], videos_kwargs={"size": {"longest_edge": 16}})


def test_largest_video_fills_the_context(processor: BaseMultiModalProcessor) -> None:
    most = processor.info.get_mm_max_tokens_per_item(1024, {"image": 1, "video": 1})
    assert most == {"image": 5 * 4, "video": 1024}
    dummy = processor.get_dummy_mm_inputs({"image": 1, "video": 1})
    assert dummy["mm_placeholders"]["video"][0].get_num_embeds() == 8 * 4


@pytest.fixture
def merging(configure: Callable[..., ModelConfig]) -> BaseMultiModalProcessor:
    return MULTIMODAL_REGISTRY.create_processor(configure(video_pruning_rate=0.5))


def test_merging_takes_visual_tokens_out_of_the_prompt_and_leaves_the_text(
    merging: BaseMultiModalProcessor, processor: BaseMultiModalProcessor, hf: Any, clips: list[Path]
) -> None:
    prompt = prompt_with("Look: <video>one <video>two")
    whole = process(processor, prompt, clips[1::-1])["prompt_token_ids"]
    given = process(merging, prompt, clips[1::-1])
    image = hf.image_token_id
    assert [i for i in given["prompt_token_ids"] if i != image] == [i for i in whole if i != image]
    counts = [tokens_of_frames(frames, hf.image_seq_len, 0.5) for frames in (8, 2)]
    runs = [len(list(run)) for token, run in itertools.groupby(given["prompt_token_ids"]) if token == image]
    assert runs == [*counts[0], *counts[1]] == [4, 1, 2, 2, 1, 2, 2, 2, 4, 1]
    assert [place.get_num_embeds() for place in given["mm_placeholders"]["video"]] == [16, 5]


def test_a_rate_of_zero_changes_nothing(
    configure: Callable[..., ModelConfig], processor: BaseMultiModalProcessor, clips: list[Path]
) -> None:
    at_zero = MULTIMODAL_REGISTRY.create_processor(configure(video_pruning_rate=0.0))
    prompt = prompt_with("<video>What?")
    given, usual = process(at_zero, prompt, clips[:1]), process(processor, prompt, clips[:1])
    assert given["prompt_token_ids"] == usual["prompt_token_ids"]


def test_images_are_not_merged(merging: BaseMultiModalProcessor, hf: Any) -> None:
    image = Image.fromarray(np.zeros((50, 70, 3), dtype=np.uint8))
    given = process(merging, prompt_with("<image>What?"), [], [image])
    assert given["prompt_token_ids"].count(hf.image_token_id) == 5 * hf.image_seq_len


def test_vllm_refuses_another_method_and_a_rate_that_is_none(configure: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ValueError, match="vidcom2"):
        configure(video_pruning_rate=0.5, video_pruning_method="vidcom2")
    with pytest.raises(ValueError, match="less than 1"):
        configure(video_pruning_rate=1.0)


def test_plugin_can_be_registered_twice(configure: Callable[..., ModelConfig]) -> None:
    plugin.register()
    plugin.register()
    model, _ = ModelRegistry.resolve_model_cls("SmolVLMForConditionalGeneration", configure())
    assert model is SmolVLMVideoForConditionalGeneration


class TestContractWithVllm032:
    """What the model class takes for granted in vLLM and in transformers."""

    def test_methods_that_are_overridden_or_called_exist(self) -> None:
        for name in (
            "_apply_hf_processor_main",
            "_apply_prompt_updates",
            "_apply_prompt_updates_via_text",
            "_call_hf_processor",
            "_finalize_hf_mm_data",
            "_find_mm_placeholders",
            "_get_hf_mm_inputs",
            "_get_mm_fields_config",
            "_get_prompt_updates",
            "_matched_updates_from_result",
        ):
            assert hasattr(BaseMultiModalProcessor, name)
        assert hasattr(SmolVLMForConditionalGeneration, "_mark_tower_model")

    @pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7])
    def test_merging_keeps_as_many_tokens_as_vllms_own_pruning(self, rate: float) -> None:
        for frames in (1, 8, 50):
            assert sum(tokens_of_frames(frames, 64, rate)) == compute_retained_tokens_count(64, frames, rate)

    def test_stock_model_still_lacks_videos(self) -> None:
        with pytest.raises(ValueError, match="Only image"):
            SmolVLMForConditionalGeneration.get_placeholder_str("video", 1)

    def test_transformers_writes_a_video_from_its_frames_and_metadata(self, hf: Any) -> None:
        metadata = VideoMetadata(total_num_frames=2, fps=1.0, duration=2.0, frames_indices=[0, 1])
        inputs = {"pixel_values": torch.empty(1, 2, 0), "video_metadata": [metadata]}
        text = hf.replace_video_token(inputs, video_idx=0)
        assert text.count(hf.image_token) == 2 * hf.image_seq_len
