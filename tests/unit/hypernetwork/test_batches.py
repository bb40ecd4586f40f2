"""Several videos pass the models together, get the adapters they get alone, and none is lost for want of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from f2l_vllm.hypernetwork.adapter import Adapter
from f2l_vllm.hypernetwork.batching import group_by_length, is_out_of_memory, run_groups
from f2l_vllm.hypernetwork.internalizer import Internalizer, NotEnoughMemoryError
from f2l_vllm.video.sample import SampledVideo, sample_video
from tests.support.videos import write_video
from tests.unit.hypernetwork.test_internalizer import hyper, internalizer, model  # noqa: F401  # fixtures

FRAMES = (20, 60, 30, 60, 10)  # 2, 6, 3, 6 and 1 of which are sampled
OUT_OF_MEMORY = {
    "python": MemoryError(),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
}


@pytest.fixture(scope="module")
def videos(internalizer: Internalizer, tmp_path_factory: pytest.TempPathFactory) -> list[SampledVideo]:  # noqa: F811
    folder = tmp_path_factory.mktemp("batch")
    sizes = ((64, 48), (48, 64), (80, 40), (32, 32), (64, 64))
    return [
        sample_video(write_video(folder / f"{index}.mp4", frames=frames, fps=10, size=size), internalizer.processor)
        for index, (frames, size) in enumerate(zip(FRAMES, sizes, strict=True))
    ]


@pytest.fixture(scope="module")
def alone(internalizer: Internalizer, videos: list[SampledVideo]) -> list[Adapter]:  # noqa: F811
    return [internalizer.internalize_frames(sampled) for sampled in videos]


def assert_same(have: Adapter, want: Adapter) -> None:
    for name, pair in want.factors.items():
        for a, b in zip(have.factors[name], pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def limited(internalizer: Internalizer, fits: Callable[[int], bool], error: Exception) -> tuple[Any, list[int]]:  # noqa: F811
    """The internalizer's pass, failing where `fits(videos in it)` is False; and the sizes it was tried with."""
    real, tried = internalizer._run, []

    def run(some: Sequence[SampledVideo], *rest: Any) -> Any:
        tried.append(len(some))
        if not fits(len(some)):
            raise error
        return real(some, *rest)

    return run, tried


@pytest.mark.parametrize("max_tokens", [None, 500, 1])
def test_a_batch_gives_every_video_the_adapter_it_gets_alone_in_order(
    internalizer: Internalizer,  # noqa: F811
    videos: list[SampledVideo],
    alone: list[Adapter],
    max_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, passes = limited(internalizer, lambda _: True, MemoryError())
    monkeypatch.setattr(internalizer, "_run", run)
    adapters = internalizer.internalize_many(videos, max_tokens)
    assert passes == {None: [5], 500: passes, 1: [1] * 5}[max_tokens]
    assert 1 < len(passes) < 5 or max_tokens != 500
    assert (adapters[0].factors["down_proj"][1] - adapters[2].factors["down_proj"][1]).abs().max() > 1e-4
    for have, want in zip(adapters, alone, strict=True):
        assert_same(have, want)
        keys = ("frames", "visual_tokens", "prompt_tokens", "timestamps", "rank")
        assert [getattr(have.info, key) for key in keys] == [getattr(want.info, key) for key in keys]


def test_chunks_pass_together_and_are_composed_as_they_are_alone(
    internalizer: Internalizer,  # noqa: F811
    videos: list[SampledVideo],
    alone: list[Adapter],
) -> None:
    rank = internalizer.hyper.config.rank
    composed = internalizer.internalize_chunks(videos[:3])
    assert composed.rank == composed.info.rank == 4 * rank
    for name, pair in composed.factors.items():
        for place, factor in enumerate(pair):
            parts = [adapter.factors[name][place][:, :rank] for adapter in alone[:3]]
            bias = alone[0].factors[name][place][:, rank:]
            torch.testing.assert_close(factor, torch.cat([*parts, bias], dim=1), rtol=1e-4, atol=1e-5)
    assert (composed.info.chunks, composed.info.frames) == (3, sum(len(v.frames) for v in videos[:3]))
    with pytest.raises(ValueError, match="nothing to compose"):
        internalizer.internalize_chunks([])


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY.keys())
def test_a_pass_that_runs_out_of_memory_is_split_until_it_fits(
    internalizer: Internalizer,  # noqa: F811
    videos: list[SampledVideo],
    alone: list[Adapter],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, tried = limited(internalizer, lambda count: count <= 2, error)
    monkeypatch.setattr(internalizer, "_run", run)
    for have, want in zip(internalizer.internalize_many(videos), alone, strict=True):
        assert_same(have, want)
    assert tried == [5, 3, 2, 1, 2]


def test_a_video_too_large_even_alone_is_named_and_the_others_adapters_are_kept(
    internalizer: Internalizer,  # noqa: F811
    videos: list[SampledVideo],
    alone: list[Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = internalizer.encoder.see

    def see(sampled: SampledVideo) -> torch.Tensor:
        if sampled is videos[3]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(sampled)

    monkeypatch.setattr(internalizer.encoder, "see", see)
    with pytest.raises(NotEnoughMemoryError, match=r"video 3 \(\d+ tokens\).*Sample fewer frames") as caught:
        internalizer.internalize_many(videos)
    kept = caught.value.adapters
    assert [adapter is None for adapter in kept] == [False, False, False, True, False]
    for index in (0, 1, 2, 4):
        assert_same(kept[index], alone[index])  # type: ignore[arg-type]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def fail(group: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        run_groups([[0, 1]], fail)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_failed_pass_is_forgotten_before_it_is_tried_again() -> None:
    held: list[Any] = []

    class Large:
        def __init__(self) -> None:
            held.append(self)

        def __del__(self) -> None:
            alive.remove(id(self))

    alive: list[int] = []

    def run(group: Sequence[int]) -> list[int]:
        assert alive == []
        large = Large()
        alive.append(id(large))
        held.clear()
        if len(group) > 1:
            raise MemoryError
        return list(group)

    assert run_groups([[3, 1, 2]], run) == ({3: 3, 1: 1, 2: 2}, {})


def test_groups_keep_the_budget_and_hold_every_video_once() -> None:
    lengths = [100, 900, 120, 5000, 110, 880]
    groups = group_by_length(lengths, 1000)
    assert groups == [[3], [1], [5], [2, 4, 0]]
    assert group_by_length([], 10) == []
    with pytest.raises(ValueError, match="positive"):
        group_by_length(lengths, 0)


def test_an_empty_batch_is_no_work(internalizer: Internalizer) -> None:  # noqa: F811
    assert internalizer.internalize_many([]) == []
