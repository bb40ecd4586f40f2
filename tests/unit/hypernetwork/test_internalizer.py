"""A real video file becomes an adapter, through the real processor and model classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from f2l_vllm.base_models.text_layers import module_sizes
from f2l_vllm.hypernetwork.adapter import Adapter
from f2l_vllm.hypernetwork.config import INSTRUCTION, HypernetworkConfig
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import Limits
from f2l_vllm.video.reading import ReadingOptions
from f2l_vllm.video.sample import Sampling, sample_video
from tests.support.block_sizes import limit_cpu
from tests.support.videos import write_video
from tests.unit.hypernetwork.test_blocks import LargestTensor

GOLDEN = Path(__file__).parent / "golden" / "hypernetwork.pt"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "bars.mp4", frames=60, fps=10, options={"bf": "2"})


@pytest.fixture(scope="module")
def model(smolvlm_dir: Path) -> torch.nn.Module:
    torch.set_num_threads(1)
    return AutoModelForImageTextToText.from_pretrained(smolvlm_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hyper(model: torch.nn.Module, smolvlm_dir: Path) -> Hypernetwork:
    torch.manual_seed(0)
    hyper = Hypernetwork(
        HypernetworkConfig(
            base_model=str(smolvlm_dir),
            num_layers=4,
            feature_size=64,
            modules=module_sizes(model, ["up_proj", "down_proj"]),
            rank=3,
            latent_size=16,
            num_blocks=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
        )
    )
    with torch.no_grad():
        for scaler in hyper.scaler_B.parameters():
            scaler.fill_(1.0)
    return hyper


@pytest.fixture(scope="module")
def internalizer(smolvlm_dir: Path, hyper: Hypernetwork, model: torch.nn.Module) -> Internalizer:
    return Internalizer(model, hyper)


def test_features_are_what_transformers_calls_hidden_states_but_the_last(
    internalizer: Internalizer, model: torch.nn.Module, video: Path
) -> None:
    inputs = internalizer.encoder.prepare(sample_video(video, internalizer.processor))
    features_BLTD, mask_BT = internalizer.encoder.features(inputs)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    assert torch.equal(features_BLTD, torch.stack(expected, dim=1))
    assert mask_BT.all()


def test_encoding_skips_the_last_layer_the_norm_and_the_head_and_leaves_no_hook(
    internalizer: Internalizer, model: torch.nn.Module, video: Path
) -> None:
    ran: list[str] = []
    text_model = model.model.text_model
    watched = {"mlp": text_model.layers[-1].mlp, "norm": text_model.norm, "head": model.lm_head}
    handles = [part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in watched.items()]
    internalizer.internalize(video)
    for handle in handles:
        handle.remove()
    assert ran == []
    assert all(not layer._forward_pre_hooks for layer in text_model.layers)


def test_reading_a_few_frames_and_tokens_at_a_time_changes_nothing(
    internalizer: Internalizer, model: torch.nn.Module, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = internalizer.encoder
    sampled = sample_video(video, internalizer.processor, sampling=Sampling(longest_edge=24))
    inputs = encoder.prepare(sampled)
    features_BLTD, _ = encoder.features(inputs)
    monkeypatch.setattr("f2l_vllm.base_models.smolvlm.VISION_HIDDEN_AT_ONCE", 4 * 16 * 96)
    limit_cpu(monkeypatch, hidden=128 * 100)
    ids, visual = encoder.tokens(sampled), encoder.see(sampled)
    assert torch.equal(ids, inputs["input_ids"][0])
    assert len(visual) == encoder.num_visual_tokens(ids)
    read: list[torch.Tensor] = []
    encoder.read([ids, ids[:50]], [visual, visual[: encoder.num_visual_tokens(ids[:50])]], lambda _, x: read.append(x))
    assert len(ids) > 100
    torch.testing.assert_close(torch.stack(read, dim=1)[:1], features_BLTD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(read, dim=1)[1:, :, :50], features_BLTD[:, :, :50], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.features(inputs)[0], features_BLTD, rtol=1e-4, atol=1e-4)
    assert all("forward" not in vars(layer.mlp) for layer in model.model.text_model.layers)


def test_large_frames_go_to_the_device_in_parts_and_give_the_same_tokens(
    internalizer: Internalizer, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = internalizer.encoder
    sampled = sample_video(video, internalizer.processor)
    whole, parts = encoder.see(sampled), list[int]()
    prepare = encoder.family.prepare_frames

    def noted(processor: Any, frames: torch.Tensor, edge: int | None) -> Any:
        parts.append(frames.nbytes)
        return prepare(processor, frames, edge)

    monkeypatch.setattr(encoder, "family", replace(encoder.family, prepare_frames=noted))
    monkeypatch.setattr("f2l_vllm.hypernetwork.encoder.SOURCE_BYTES_AT_ONCE", 2 * sampled.frames[0].nbytes)
    assert torch.equal(encoder.see(sampled), whole)
    assert len(parts) >= 3
    assert max(parts) == 2 * sampled.frames[0].nbytes
    assert sum(parts) == sampled.frames.nbytes


def test_frames_that_do_not_belong_to_the_message_are_refused(internalizer: Internalizer, video: Path) -> None:
    sampled = sample_video(video, internalizer.processor)
    ids, visual = internalizer.encoder.tokens(sampled), internalizer.encoder.see(sampled)
    with pytest.raises(ValueError, match="24 places for visual tokens, but the frames give 20"):
        internalizer.encoder.read([ids], [visual[4:]], lambda *_: None)


def test_memory_for_reading_does_not_hold_hidden_activations_scores_or_pixels_of_the_whole_video(
    internalizer: Internalizer, model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "long.mp4", frames=400, fps=10, size=(32, 32))
    sampled = sample_video(path, internalizer.processor, sampling=Sampling(max_frames=40))
    assert len(sampled.frames) == 40
    ids = internalizer.encoder.tokens(sampled)
    limit_cpu(monkeypatch, hidden=64 * len(ids))
    monkeypatch.setattr("f2l_vllm.base_models.smolvlm.VISION_HIDDEN_AT_ONCE", 8 * 16 * 96)
    with LargestTensor() as seen:
        internalizer.internalize_frames(sampled)
    weights = max(parameter.numel() for parameter in model.parameters())
    assert 64 * len(ids) > 8 * 3 * 32 * 32  # the text model's hidden vectors are more than eight frames' pixels
    assert seen.largest <= max(64 * len(ids), weights)


def test_message_is_one_user_turn_with_the_video_and_the_instruction(internalizer: Internalizer, video: Path) -> None:
    sampled = sample_video(video, internalizer.processor)
    inputs = internalizer.encoder.prepare(sampled)
    text = internalizer.processor.decode(inputs["input_ids"][0])
    assert text.startswith("<|im_start|>User: You are provided the following series of six frames from a 0:00:06")
    assert text.endswith(f"\n\n{INSTRUCTION}<end_of_utterance>\n")
    assert inputs["pixel_values"].shape[:3] == (1, 6, 3)
    assert internalizer.encoder.num_visual_tokens(inputs["input_ids"]) == 6 * internalizer.processor.image_seq_len


def test_internalizing_equals_its_steps_and_reports_them(internalizer: Internalizer, video: Path) -> None:
    reports: list[tuple[str, float]] = []
    adapter = internalizer.internalize(video, lambda stage, fraction: reports.append((stage, fraction)))
    features_BLTD, mask_BT = internalizer.encoder.features(
        internalizer.encoder.prepare(sample_video(video, internalizer.processor))
    )
    hyper = internalizer.hyper
    expected = hyper.compose([hyper.generate(features_BLTD[0], mask_BT[0])])
    assert isinstance(adapter, Adapter)
    for name, pair in expected.factors.items():
        for have, want in zip(adapter.factors[name], pair, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    assert list(dict.fromkeys(stage for stage, _ in reports)) == ["decode", "encode", "generate", "compose"]
    assert all(0.0 <= fraction <= 1.0 for _, fraction in reports)
    info = adapter.info
    assert (info.frames, info.visual_tokens, info.rank) == (6, 24, 6)
    assert info.duration_s == pytest.approx(6.0)
    assert list(info.seconds) == ["decode", "vision", "text", "perceiver", "head"]
    assert all(seconds >= 0 for seconds in info.seconds.values())


def test_different_videos_give_different_adapters_and_the_same_video_the_same(
    internalizer: Internalizer, video: Path, tmp_path: Path
) -> None:
    other = write_video(tmp_path / "other.mp4", frames=20, fps=10, size=(48, 64))
    first, again, second = (internalizer.internalize(path).factors["down_proj"][1] for path in (video, video, other))
    assert torch.equal(first, again)
    assert (first[:, :3] - second[:, :3]).abs().max() > 1e-4


def test_training_time_sampling_is_the_default_and_can_be_replaced(
    model: torch.nn.Module, hyper: Hypernetwork, smolvlm_dir: Path, video: Path
) -> None:
    config = HypernetworkConfig.from_dict(hyper.config.to_dict() | {"max_frames": 3, "longest_edge": 16})
    trained_on_three = Hypernetwork.from_tensors(config, hyper.state_dict())
    processor = AutoProcessor.from_pretrained(smolvlm_dir)
    assert Internalizer(model, trained_on_three, processor).internalize(video).info.frames == 3
    two = Internalizer(model, trained_on_three, processor, ReadingOptions(max_frames=2))
    assert two.internalize(video).info.frames == 2


def test_longest_edge_scales_frames_before_the_models_own_size(internalizer: Internalizer, video: Path) -> None:
    sharp = sample_video(video, internalizer.processor)
    blurred = sample_video(video, internalizer.processor, sampling=Sampling(longest_edge=8))
    encoder: VideoEncoder = internalizer.encoder
    one, two = encoder.prepare(sharp)["pixel_values"], encoder.prepare(blurred)["pixel_values"]
    assert one.shape == two.shape
    assert (one - two).abs().max() > 0.1


def test_loading_by_reference_and_refusing_a_hypernetwork_of_another_model(
    smolvlm_dir: Path, hyper: Hypernetwork, video: Path, tmp_path: Path
) -> None:
    hyper.save(tmp_path / "hyper", dtype=torch.float32)
    loaded = Internalizer.load(smolvlm_dir, tmp_path / "hyper", device="cpu")
    assert loaded.internalize(video).rank == 6
    with pytest.raises(ValueError, match="tiny/SmolVLM2-golden") as caught:
        Internalizer.load(smolvlm_dir, GOLDEN)
    assert str(smolvlm_dir) in str(caught.value)
    assert "(160, 64) expected, the model has (128, 64)" in str(caught.value)
    with pytest.raises(ValueError, match="base model '/nowhere' cannot be loaded"):
        Internalizer.load("/nowhere", tmp_path / "hyper")


def test_limits_and_bad_videos_reach_the_caller_as_video_errors(
    model: torch.nn.Module, hyper: Hypernetwork, internalizer: Internalizer, video: Path, tmp_path: Path
) -> None:
    strict = Internalizer(model, hyper, internalizer.processor, limits=Limits(max_duration_s=1.0))
    with pytest.raises(VideoError) as caught:
        strict.internalize(video)
    assert caught.value.code == "video_too_long"
    (tmp_path / "notes.mp4").write_text("not a video at all, only some words")
    with pytest.raises(VideoError) as caught:
        internalizer.internalize(tmp_path / "notes.mp4")
    assert caught.value.code == "not_a_video"
