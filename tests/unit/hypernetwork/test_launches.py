"""On a GPU, a pass of the hypernetwork is few launches and never waits: driven on torch's device without storage.

A tensor there has a shape and a device that is not the CPU. Every operator is checked and dispatched as on a GPU, and
one that needs a value, such as a length that depends on data, raises an error: so would a GPU be waited for.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from f2l_vllm.bench.hypernetwork_shapes import SHAPES
from f2l_vllm.hypernetwork.blocks import ACCELERATOR
from f2l_vllm.hypernetwork.internalizer import _Clock
from f2l_vllm.hypernetwork.model import Hypernetwork

WITHOUT_KERNEL = {"_unsafe_view", "empty", "new_empty", "empty_like", "detach"}


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy something. An RMSNorm is six of them; on CUDA it is one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.number += not func.is_view and func._schema.name.split("::")[1] not in WITHOUT_KERNEL
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("padded", [False, True], ids=["one video", "two, padded"])
@pytest.mark.parametrize(("tokens", "most"), [(800, 700), (3200, 760), (12800, 1700)])
def test_all_text_layers_are_read_in_few_launches(tokens: int, most: int, padded: bool) -> None:
    config = SHAPES["500M"].hypernetwork
    with torch.device("meta"):
        hyper = Hypernetwork(config).requires_grad_(False)
    with torch.no_grad(), Launches() as seen:
        videos = 1 + padded
        mask = torch.ones(videos, tokens // videos, dtype=torch.bool, device="meta") if padded else None
        reader = hyper.reader(mask)
        for _ in range(config.num_layers):
            reader.add(torch.empty(videos, tokens // videos, config.feature_size, dtype=torch.bfloat16, device="meta"))
        factors = hyper.project(reader.latents())
    assert factors["down_proj"][0].shape == (videos, 32, 16, 2560)
    assert most / 2 < seen.number <= most + (60 if padded else 0)
    assert seen.largest <= max(ACCELERATOR.hidden, ACCELERATOR.context)


class Stream:
    """A GPU's stream: it works while nobody waits, a second for each mark."""

    def __init__(self) -> None:
        self.clock = count()
        self.waits = 0


def test_a_gpu_is_waited_for_once_and_each_stage_is_charged_what_the_gpu_took(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, on: Stream) -> None:
            self.at = next(on.clock)

        def synchronize(self) -> None:
            stream.waits += 1

        def elapsed_time(self, later: Event) -> float:
            assert stream.waits, "the GPU has not come there"
            return 1000.0 * (later.at - self.at)

    def wait(_device: torch.device) -> None:
        stream.waits += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    clock = _Clock(torch.device("cuda"))
    for stage in ("vision", *("text", "perceiver") * 32, "head"):
        clock.lap(stage)
    assert stream.waits == 0
    assert clock.seconds() == {"vision": 1, "text": 32, "perceiver": 32, "head": 1}
    assert stream.waits == 1
