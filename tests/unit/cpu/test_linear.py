"""Linear layers with packed weights, on vLLM's own layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from f2l_vllm.cpu.linear import MIN_ELEMENTS, pack_linears

INPUT, OUTPUT = 200, 400
ROWS = [(0, INPUT), (1, INPUT), (3, INPUT), (70, INPUT), (2, 5, INPUT), (INPUT,)]


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    group = type("OneWorker", (), {"rank_in_group": 0, "world_size": 1})()
    monkeypatch.setattr(parallel_state, "_TP", group)
    with set_current_vllm_config(VllmConfig()):
        yield


def make_linear(dtype: torch.dtype, *, bias: bool = True, inputs: int = INPUT) -> ReplicatedLinear:
    layer = ReplicatedLinear(inputs, OUTPUT, bias=bias, params_dtype=dtype, disable_tp=True, return_bias=False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=inputs**-0.5)
    layer.quant_method.process_weights_after_loading(layer)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_plain_layer_for_any_rows(dtype: torch.dtype, bias: bool) -> None:
    layer = make_linear(dtype, bias=bias)
    weight, offset = layer.weight.data.clone(), layer.bias
    # A processor without AVX-512 keeps plain bf16 weights.
    can_pack = dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert pack_linears(layer) == can_pack
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for shape in ROWS:
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(layer(x), F.linear(x, weight, offset), rtol=tolerance, atol=tolerance)


def test_input_need_not_be_contiguous() -> None:
    layer = make_linear(torch.float32)
    weight = layer.weight.data.clone()
    pack_linears(layer)
    for x in (torch.randn(5, 2 * INPUT)[:, :INPUT], torch.randn(INPUT, 5).T):
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_a_packed_weight_is_held_once() -> None:
    layer = make_linear(torch.float32)
    pack_linears(layer)
    assert layer.weight.numel() == 0
    assert pack_linears(layer) == 0


def test_small_weights_and_fp16_are_left_as_they_are() -> None:
    small = make_linear(torch.float32, inputs=MIN_ELEMENTS // OUTPUT - 1)
    half = make_linear(torch.float16)
    assert pack_linears(nn.ModuleList([small, half])) == 0
    assert small.weight.numel() < MIN_ELEMENTS <= half.weight.numel()


def test_a_head_that_is_also_the_embedding_still_embeds() -> None:
    embedding = VocabParallelEmbedding(OUTPUT, INPUT, params_dtype=torch.float32)
    nn.init.normal_(embedding.weight)
    head = ParallelLMHead(OUTPUT, INPUT, params_dtype=torch.float32).tie_weights(embedding)
    model = nn.ModuleDict({"embedding": embedding, "head": head}).requires_grad_(False)
    for layer in model.values():
        layer.quant_method.process_weights_after_loading(layer)
    assert pack_linears(model) == 1
    ids = torch.tensor([3, OUTPUT - 1])
    rows = embedding(ids)
    torch.testing.assert_close(rows, embedding.weight[ids])
    torch.testing.assert_close(head.quant_method.apply(head, rows), rows @ embedding.weight.T, rtol=1e-4, atol=1e-4)
