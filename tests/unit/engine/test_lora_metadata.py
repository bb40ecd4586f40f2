"""Our metadata of a step's adapters is vLLM's, tensor for tensor, over whatever batches follow each other."""

from __future__ import annotations

import inspect
import random
from argparse import Namespace
from typing import Any

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops import LoRAKernelMeta
from vllm.lora.punica_wrapper import punica_gpu
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from f2l_vllm import vllm_versions
from f2l_vllm.engine import lora_metadata

SLOTS, TOKENS, VOCABULARY = 5, 64, 1000
CHANGED = f"vLLM {vllm_versions.installed()} prepares its LoRA metadata another way: see engine/lora_metadata.py"
STOCK = punica_gpu.PunicaWrapperGPU.update_metadata
INDICES = ("token_lora_indices", "sampler_indices", "sampler_indices_padded")
PER_ROW = ("token_lora_mapping", "token_indices_sorted_by_lora_ids")
PER_SLOT = ("active_lora_ids", "num_tokens_per_lora", "lora_token_start_loc")
ON_HOST = ("no_lora_flag_cpu", "num_active_loras_cpu", "default_num_active_loras_cpu")


@pytest.fixture(params=[False, True], ids=["launched for all slots", "for active ones"])
def wrappers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two wrappers as vLLM makes them on a GPU, in the CPU's memory."""
    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)  # imported with Triton only
    config = Namespace(max_loras=SLOTS, specialize_active_lora=request.param)
    return [punica_gpu.PunicaWrapperGPU(TOKENS, 8, "cpu", lora_config=config) for _ in range(2)]


def compare(stock: Any, ours: Any) -> None:
    assert (ours.indices_len, ours.is_prefill) == (stock.indices_len, stock.is_prefill), CHANGED
    for name in INDICES:
        assert torch.equal(getattr(ours, name), getattr(stock, name)), (name, CHANGED)
    length = stock.indices_len[3]
    assert torch.equal(ours._embeddings_indices[:length], stock._embeddings_indices[:length]), CHANGED
    for which, rows in (("token_mapping_meta", stock.indices_len[0]), ("prompt_mapping_meta", stock.indices_len[1])):
        one, other = getattr(ours, which), getattr(stock, which)
        for name in (*PER_SLOT, *ON_HOST):
            assert torch.equal(getattr(one, name), getattr(other, name)), (which, name, CHANGED)
        for name in PER_ROW if not bool(other.no_lora_flag_cpu) else ():
            assert torch.equal(getattr(one, name)[:rows], getattr(other, name)[:rows]), (which, name, CHANGED)


@pytest.mark.parametrize("seed", range(10))
def test_every_tensor_is_vllms_over_many_batches(wrappers: list[Any], seed: int) -> None:
    rng = random.Random(seed)
    stock, ours = wrappers
    where = {name: getattr(ours, f"_{name}").data_ptr() for name in INDICES}
    where |= {name: getattr(ours.token_mapping_meta, name).data_ptr() for name in (*PER_ROW, *PER_SLOT)}
    for _ in range(40):
        slots = [rng.choice([None, 100 + slot]) for slot in range(SLOTS)]
        known = [0, 0, *(one for one in slots if one is not None)]
        some = known if rng.random() < 0.8 else [0]
        requests = [rng.choice(some) for _ in range(rng.randrange(9))]
        tokens = [one for one in requests for _ in range(rng.choice([1, 1, 3, 7]))]
        mapping = LoRAMapping(tuple(tokens), tuple(requests), is_prefill=rng.random() < 0.5)
        STOCK(stock, mapping, slots, SLOTS + 1, VOCABULARY)
        lora_metadata.update_metadata(ours, mapping, slots, SLOTS + 1, VOCABULARY)
        compare(stock, ours)
    kept = {name: getattr(ours, f"_{name}").data_ptr() for name in INDICES}
    kept |= {name: getattr(ours.token_mapping_meta, name).data_ptr() for name in (*PER_ROW, *PER_SLOT)}
    assert kept == where  # CUDA graphs read from there


def test_an_adapter_without_a_slot_is_an_error_as_in_vllm(wrappers: list[Any]) -> None:
    mapping = LoRAMapping((7,), (7,), is_prefill=False)
    for update, wrapper in zip((STOCK, lora_metadata.update_metadata), wrappers, strict=True):
        with pytest.raises(KeyError):
            update(wrapper, mapping, [None] * SLOTS, SLOTS + 1, VOCABULARY)


def test_vllm_asks_by_the_method_that_is_replaced_and_keeps_nothing_else() -> None:
    ours = list(inspect.signature(lora_metadata.update_metadata).parameters)[:-1]
    assert ours == list(inspect.signature(STOCK).parameters)[:-1], CHANGED
    body = inspect.getsource(STOCK).split('"""')[-1]
    calls = ["self.is_prefill = mapping.is_prefill", "self._update_base_metadata(", ".prepare_tensors("]
    assert [body.count(call) for call in calls] == [1, 1, 2], CHANGED
    base = inspect.getsource(PunicaWrapperBase._update_base_metadata)
    assert base.count(".copy_(") == 4, CHANGED
    assert base.count("self.") == 6, CHANGED  # the device, four tensors, their lengths


def test_installing_replaces_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punica_gpu.PunicaWrapperGPU, "update_metadata", STOCK)
    lora_metadata.install()
    lora_metadata.install()
    assert punica_gpu.PunicaWrapperGPU.update_metadata is lora_metadata.update_metadata
