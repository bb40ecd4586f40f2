"""Visual tokens merged from frame to frame: the mathematics, and internalization that reads fewer of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from f2l_vllm.base_models.merging import merge_tokens, tokens_of_frames, without_merged
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.video.chunks import Chunking
from f2l_vllm.video.reading import ReadingOptions
from f2l_vllm.video.sample import SampledVideo, sample_video
from tests.support.videos import write_video

RATES = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]


def merged_by_hand(frames_FPD: Tensor, counts: list[int]) -> Tensor:
    """Every token as the mean of the run it begins, found place by place."""
    num_frames, places, _ = frames_FPD.shape
    begins = [set(range(places))]
    for frame in range(1, num_frames):
        now, last = frames_FPD[frame].double(), frames_FPD[frame - 1].double()
        similar = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(now, last, strict=True)]
        begins.append(set(sorted(range(places), key=lambda place: similar[place])[: counts[frame]]))
    merged = []
    for frame in range(num_frames):
        for place in sorted(begins[frame]):
            end = frame + 1
            while end < num_frames and place not in begins[end]:
                end += 1
            merged.append(frames_FPD[frame:end, place].double().mean(0))
    return torch.stack(merged)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("size", [(1, 4), (2, 1), (8, 4), (5, 7), (33, 64)])
def test_merged_tokens_are_the_means_of_runs_in_order(rate: float, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(size[0])
    frames_FPD = torch.randn(*size, 24, generator=generator) + 0.5 * torch.randn(size[1], 24, generator=generator)
    counts = tokens_of_frames(*size, rate)
    merged_ND = merge_tokens([frames_FPD], size[0], rate)
    assert len(merged_ND) == sum(counts)
    torch.testing.assert_close(merged_ND.double(), merged_by_hand(frames_FPD, counts), rtol=1e-5, atol=1e-6)


def test_a_still_picture_stays_what_it_is() -> None:
    still_PD = torch.randn(6, 16)
    merged_ND = merge_tokens([torch.stack([still_PD] * 9)], 9, 0.8)
    assert len(merged_ND) == 14
    torch.testing.assert_close(merged_ND[:6], still_PD)
    assert all(torch.isclose(merged, still_PD).all(dim=1).any() for merged in merged_ND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_zero_changes_no_bit(dtype: torch.dtype) -> None:
    frames_FPD = torch.randn(7, 5, 12).to(dtype)
    assert torch.equal(merge_tokens([frames_FPD], 7, 0.0), frames_FPD.flatten(0, 1))


def test_frames_may_come_a_few_at_a_time() -> None:
    frames_FPD = torch.randn(10, 4, 12)
    whole = merge_tokens([frames_FPD], 10, 0.6)
    assert torch.equal(merge_tokens(frames_FPD.split(3), 10, 0.6), whole)
    with pytest.raises(ValueError, match="zip"):
        merge_tokens([frames_FPD[:9]], 10, 0.6)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("frames", [1, 2, 8, 31])
def test_the_first_frame_is_whole_and_later_ones_share_evenly(rate: float, frames: int) -> None:
    counts = tokens_of_frames(frames, 64, rate)
    assert len(counts) == frames
    assert counts[0] == 64
    assert sum(counts) == max(64 + frames - 1, int(frames * 64 * (1 - rate)))
    assert not counts[1:] or 1 <= min(counts[1:]) <= max(counts[1:]) <= min(64, min(counts[1:]) + 1)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 7, float("nan")])
def test_a_rate_that_is_none_says_what_a_rate_is(rate: float) -> None:
    with pytest.raises(ValueError, match="from 0 \\(none\\) to less than 1"):
        tokens_of_frames(8, 4, rate)


def test_ids_lose_image_tokens_frame_by_frame_and_nothing_else() -> None:
    ids = [1, 9, 9, 9, 2, 9, 9, 9, 3, 9, 9, 9, 4]
    assert without_merged(ids, 9, 3, [3, 1, 2]) == [1, 9, 9, 9, 2, 9, 3, 9, 9, 4]
    assert without_merged(ids, 9, 3, [3, 3, 3]) == ids
    for wrong in ([3, 1], [3, 1, 1, 1]):
        with pytest.raises(ValueError, match="9 image tokens"):
            without_merged(ids, 9, 3, wrong)


@pytest.fixture(scope="module")
def internalizer(hypernetwork_model: Path) -> Internalizer:
    return Internalizer.load(hypernetwork_model, hypernetwork_model / "hypernetwork")


@pytest.fixture(scope="module")
def merging(internalizer: Internalizer) -> Internalizer:
    return Internalizer(internalizer.model, internalizer.hyper, internalizer.processor, ReadingOptions(merge_rate=0.5))


@pytest.fixture(scope="module")
def videos(internalizer: Internalizer, tmp_path_factory: pytest.TempPathFactory) -> list[SampledVideo]:
    folder = tmp_path_factory.mktemp("merging")
    paths = [write_video(folder / f"{frames}.mp4", frames=frames, fps=10) for frames in (60, 20, 80)]
    return [sample_video(path, internalizer.processor) for path in paths]


def test_rate_zero_is_the_same_adapter(internalizer: Internalizer, videos: list[SampledVideo]) -> None:
    at_zero = Internalizer(
        internalizer.model, internalizer.hyper, internalizer.processor, ReadingOptions(merge_rate=0.0)
    )
    want, have = internalizer.internalize_frames(videos[0]), at_zero.internalize_frames(videos[0])
    for name, (a, b) in want.factors.items():
        assert torch.equal(have.factors[name][0], a)
        assert torch.equal(have.factors[name][1], b)
    assert want.info.merge_rate == have.info.merge_rate == 0.0


def test_text_layers_read_merged_tokens_between_the_same_text(
    merging: Internalizer, internalizer: Internalizer, videos: list[SampledVideo]
) -> None:
    sampled, encoder = videos[0], merging.encoder
    ids, visual = encoder.tokens(sampled), encoder.see(sampled)
    whole, all_visual = internalizer.encoder.tokens(sampled), internalizer.encoder.see(sampled)
    image = internalizer.processor.image_token_id
    assert torch.equal(ids[ids != image], whole[whole != image])
    frames = len(sampled.frames)
    counts = tokens_of_frames(frames, len(all_visual) // frames, 0.5)
    assert encoder.num_visual_tokens(ids) == len(visual) == sum(counts) == len(all_visual) // 2
    by_hand = merged_by_hand(all_visual.unflatten(0, (frames, -1)), counts)
    torch.testing.assert_close(visual.double(), by_hand, rtol=1e-5, atol=1e-5)

    read: list[Tensor] = []
    encoder.read([ids], [visual], lambda _, features: read.append(features))
    text_model = merging.model.model.text_model
    embeds = text_model.get_input_embeddings()(ids)[None].detach()
    embeds[0, ids == image] = visual
    with torch.no_grad():
        expected = text_model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    torch.testing.assert_close(torch.stack(read), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_merging_gives_another_adapter_and_says_what_was_read(
    merging: Internalizer, internalizer: Internalizer, videos: list[SampledVideo]
) -> None:
    merged, whole = merging.internalize_frames(videos[0]), internalizer.internalize_frames(videos[0])
    assert (merged.factors["down_proj"][1] - whole.factors["down_proj"][1]).abs().max() > 1e-4
    assert merged.info.merge_rate == 0.5
    assert merged.info.visual_tokens == whole.info.visual_tokens // 2
    saved = whole.info.visual_tokens - merged.info.visual_tokens
    assert merged.info.prompt_tokens == whole.info.prompt_tokens - saved


def test_a_batch_of_merged_videos_gives_each_what_it_gets_alone(
    merging: Internalizer, videos: list[SampledVideo]
) -> None:
    for have, sampled in zip(merging.internalize_many(videos), videos, strict=True):
        want = merging.internalize_frames(sampled)
        assert have.info.visual_tokens == want.info.visual_tokens
        for name, (a, b) in want.factors.items():
            torch.testing.assert_close(have.factors[name][0], a, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(have.factors[name][1], b, rtol=1e-4, atol=1e-5)


def test_every_chunk_begins_with_a_whole_frame(merging: Internalizer, tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", frames=80, fps=10)
    info = merging.internalize(path, chunking=Chunking(seconds=4, max_chunks=2)).info
    per_frame = merging.processor.image_seq_len
    assert info.frames == 8
    assert info.visual_tokens == 2 * sum(tokens_of_frames(4, per_frame, 0.5))


def test_a_rate_of_one_is_refused(internalizer: Internalizer) -> None:
    with pytest.raises(ValueError, match="less than 1"):
        Internalizer(internalizer.model, internalizer.hyper, internalizer.processor, ReadingOptions(merge_rate=1.0))
