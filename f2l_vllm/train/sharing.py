"""Sums gradients over processes while the backward pass still computes others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

BUCKET_BYTES = 25 << 20  # as torch's DistributedDataParallel


class Sharing:
    """The gradients of some parameters, in buckets, the last parameters first, as the backward pass comes upon them.

    Every process sums the buckets in the same order, each when all its gradients are there and the one before is under
    way. What is left is summed when the backward pass has ended. A parameter that a process did not need counts as
    zero.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        size = bucket_bytes
        for parameter in reversed(parameters):
            if size >= bucket_bytes:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.nbytes
        self._bucket_of = {parameter: index for index, bucket in enumerate(self._buckets) for parameter in bucket}
        self._missing: list[int] = []
        self._under_way: list[tuple[Tensor, distributed.Work]] = []
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """The backward pass that comes next is a step's last one."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._hooks = [one.register_post_accumulate_grad_hook(self._ready) for one in self._bucket_of]

    def finish(self, figures: Tensor) -> Tensor:
        """Give every parameter the sum of all processes' gradients; returns the sum of their `figures`."""
        for hook in self._hooks:
            hook.remove()
        while len(self._under_way) < len(self._buckets):
            self._send()
        figures = figures.clone()
        last = distributed.all_reduce(figures, async_op=True)
        for bucket, (flat, work) in zip(self._buckets, self._under_way, strict=True):
            work.wait()
            for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)
        last.wait()
        self._under_way = []
        return figures

    def _ready(self, parameter: Tensor) -> None:
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]  # hooks are called with the parameter
        while len(self._under_way) < len(self._buckets) and self._missing[len(self._under_way)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._under_way)]
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._under_way.append((flat, distributed.all_reduce(flat, async_op=True)))
