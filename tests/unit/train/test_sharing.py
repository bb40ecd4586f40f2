"""Processes that share a step learn what one process learns from all its parts."""

import multiprocessing
from pathlib import Path

import torch
from torch import distributed, nn

from f2l_vllm.train.sharing import Sharing

PROCESSES, PARTS = 2, 2


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    sizes = {"unused": (2, 2), "spare": (8, 4), "first": (8, 16), "second": (16, 4)}
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def loss(module: nn.ModuleDict, process: int, part: int) -> torch.Tensor:
    """Only the second process needs `spare`, and only in its first part."""
    generator = torch.Generator().manual_seed(10 * process + part)
    x = torch.randn(5 + 3 * process, 8, generator=generator)
    out = module["second"](module["first"](x).relu())
    if process == 1 and part == 0:
        out = out + module["spare"](x)
    return out.square().sum()


def backward(module: nn.ModuleDict, process: int, sharing: Sharing | None) -> None:
    for part in range(PARTS):
        assert sharing is None or not sharing._under_way, "not before the step's last part"
        if sharing is not None and part == PARTS - 1:
            sharing.begin()
        loss(module, process, part).backward()


def share(process: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=process, world_size=PROCESSES)
    module, taken = net(), []
    sharing = Sharing(list(module.parameters()), bucket_bytes=300)
    for _ in range(2):
        module.zero_grad()
        backward(module, process, sharing)
        before_the_end = len(sharing._under_way)
        figures = sharing.finish(torch.tensor([1.0, float(process)]))
        taken.append(({name: one.grad.clone() for name, one in module.named_parameters()}, figures, before_the_end))
    torch.save(taken, folder / f"{process}.pt")
    distributed.destroy_process_group()


def test_two_processes_get_the_sum_of_all_their_parts_and_begin_before_the_end(tmp_path: Path) -> None:
    whole = net()
    for process in range(PROCESSES):
        backward(whole, process, None)
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=share, args=(process, tmp_path)) for process in range(PROCESSES)]
    for one in running:
        one.start()
    for one in running:
        one.join(60)
        assert one.exitcode == 0
    first, second = (torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in range(PROCESSES))
    for (gradients, figures, begun), (others, other_figures, _) in zip(first, second, strict=True):
        assert begun == 2, "of three buckets, when the backward pass has ended; the third has what was not needed"
        assert figures.tolist() == other_figures.tolist() == [2.0, 1.0]
        for name, parameter in whole.named_parameters():
            assert torch.equal(gradients[name], others[name]), "the same in every process, bit for bit"
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradients[name], expected)
