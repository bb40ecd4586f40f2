"""Adapters in a real engine in a process of its own: too few slots and places, broken files, removal in mid-answer."""

import shutil
from argparse import Namespace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from f2l_vllm.engine.lora_manager import HostTierLoRAManager
from f2l_vllm.engine.residency import FIRST_ADAPTER_ID

MAX_TOKENS = 10
SLOTS, PLACES = 2, 4
QUESTION = "Which colour is the square, and where does the circle move? The quick brown fox jumps over the lazy dog."


class Engine:
    """Two slots, four places, prefix cache on, prompts read in chunks of 32 tokens."""

    def __init__(self, checkpoint):
        from vllm import LLM

        self.llm = LLM(
            str(checkpoint),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=32,
            kv_cache_memory_bytes=32 << 20,
            enable_prefix_caching=True,
            enable_lora=True,
            max_loras=SLOTS,
            max_cpu_loras=PLACES,
            max_lora_rank=16,
            lora_target_modules=["down_proj"],
        )
        self.core = self.llm.llm_engine

    def ask(self, adapters, question=QUESTION, max_tokens=MAX_TOKENS):
        """One batch: token ids and why each ended, per adapter (None: the base model)."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = self.llm.generate([question] * len(adapters), sampling, lora_request=adapters, use_tqdm=False)
        return [(tuple(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs]

    def close(self):
        self.core.engine_core.shutdown()


@pytest.fixture(scope="module")
def engine(smolvlm_dir):
    engine = Engine(smolvlm_dir)
    yield engine
    engine.close()


@pytest.fixture
def adapter(make_lora, tmp_path):
    """`adapter(number, first_id)`: a request for a copy of a random adapter, at a path of its own."""

    def make(number, first_id=0):
        path = tmp_path / f"{first_id}-{number}"
        if not path.exists():
            shutil.copytree(make_lora(rank=8 if number % 2 else 16, seed=number), path)
        return LoRARequest(f"{tmp_path.name}-{first_id}-{number}", first_id + number, str(path))

    return make


def test_many_adapters_and_the_base_model_in_one_batch_answer_as_each_alone(engine, adapter):
    adapters = [None, *(adapter(number) for number in range(1, 8))]  # 7 adapters, 2 slots, 4 places
    alone = []
    for one in adapters:
        engine.llm.reset_prefix_cache()
        alone += engine.ask([one])
    assert len({tokens for tokens, _ in alone}) == len(adapters)
    engine.llm.reset_prefix_cache()
    assert engine.ask(adapters * 2) == alone * 2
    assert engine.ask(adapters[::-1]) == alone[::-1]  # from the prefix cache
    engine.ask([adapter(1)])
    assert len(engine.core.list_loras()) <= PLACES  # those that nobody uses have left


def test_one_whose_adapter_cannot_be_loaded_fails_and_the_others_do_not(engine, adapter):
    good, missing, short, detached = (adapter(number) for number in (1, 2, 3, 4))
    alone = engine.ask([good]) + engine.ask([None])
    shutil.rmtree(missing.lora_path)
    weights = f"{short.lora_path}/adapter_model.safetensors"
    with open(weights, "r+b") as file:
        file.truncate(file.seek(0, 2) - 1000)
    weights = f"{detached.lora_path}/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key.replace("model.model.", "model."): value for key, value in tensors.items()}, weights)
    answers = engine.ask([good, missing, None, short, detached, good])
    assert answers[0] == answers[5] == alone[0]
    assert answers[2] == alone[1]
    for failed in (1, 3, 4):
        assert answers[failed] == ((), "error")  # above all not the base model's answer
    assert engine.ask([good, None]) == alone


def test_ours_stay_in_memory_until_they_are_removed(engine, adapter):
    ours = [adapter(number, FIRST_ADAPTER_ID) for number in (1, 2, 3)]
    for one in ours:
        assert engine.core.add_lora(one)
    for one in ours:  # what happens to the files of a resident adapter changes nothing
        with open(f"{one.lora_path}/adapter_model.safetensors", "r+b") as file:
            file.seek(4096)
            file.write(bytes(2048))
        shutil.rmtree(one.lora_path)
    first = engine.ask(ours)
    assert len(set(first)) == 3
    engine.ask([adapter(number) for number in range(1, 8)])  # more than there are places
    engine.llm.reset_prefix_cache()
    assert engine.ask(ours) == first
    expected = engine.ask([adapter(number) for number in (1, 2, 3)])
    assert [tokens for tokens, _ in first] == [tokens for tokens, _ in expected]
    for one in ours:
        assert engine.core.remove_lora(one.lora_int_id)
    assert engine.ask(ours) == [((), "error")] * 3


def test_an_adapter_in_use_is_not_removed(engine, adapter):
    from vllm import SamplingParams

    one = adapter(1, FIRST_ADAPTER_ID)
    many = 300  # the engine does not wait for this process, however late that is
    [expected] = engine.ask([one], max_tokens=many)
    engine.core.add_request(
        "running", QUESTION, SamplingParams(temperature=0, max_tokens=many, ignore_eos=True), lora_request=one
    )
    engine.core.step()
    assert engine.core.remove_lora(one.lora_int_id) is False
    shutil.rmtree(one.lora_path)
    outputs = []
    while engine.core.has_unfinished_requests():
        outputs += engine.core.step()
    assert tuple(outputs[-1].outputs[0].token_ids) == expected[0]
    assert engine.core.remove_lora(one.lora_int_id) is True


@pytest.fixture
def loaders():
    """`loaders(dtype)`: vLLM's manager and ours as a model with one wrapped linear per layer has them, to load with."""
    from f2l_vllm.engine.base_models.smolvlm import SmolVLMVideoForConditionalGeneration

    def check(_lora):
        """Of what these adapters do not have."""

    def make(dtype):
        model_manager = Namespace(
            model=SmolVLMVideoForConditionalGeneration,
            supported_lora_modules=["down_proj"],
            packed_modules_mapping={},
            packed_modules={},
            modules={f"model.text_model.layers.{layer}.mlp.down_proj": None for layer in range(4)},
            moe_ep_load_spec=None,
            is_pooling_model=False,
            _is_moe=False,
            _validate_moe_lora_format=check,
            _validate_modules_to_save=check,
            _validate_token_classification_lora=check,  # vLLM 0.32
            _validate_classification_head_lora=check,  # vLLM 0.33
        )
        model_manager._get_lora_layer_weights = partial(LoRAModelManager._get_lora_layer_weights, model_manager)
        vllm_config = Namespace(
            parallel_config=Namespace(pipeline_parallel_size=1),
            scheduler_config=Namespace(max_num_seqs=2, max_num_batched_tokens=32),
            model_config=Namespace(
                get_vocab_size=lambda: 512,
                is_encoder_decoder=False,
                hf_config=Namespace(get_text_config=lambda: Namespace()),
            ),
            lora_config=Namespace(lora_dtype=dtype, max_lora_rank=16),
        )
        made = []
        for kind in (LRUCacheWorkerLoRAManager, HostTierLoRAManager):
            manager = kind(vllm_config, torch.device("cpu"), {}, LoRAModel)
            manager._adapter_manager = model_manager
            manager._targets = set(model_manager.modules)
            made.append(manager)
        return made

    return make


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16])
def test_a_load_reads_what_vllms_own_reads(loaders, make_lora, stored, served):
    stock, ours = loaders(served)
    for seed, rank in ((1, 8), (2, 16), (3, 16)):
        request = LoRARequest("one", seed, str(make_lora(rank=rank, seed=seed, dtype=stored)))
        expected, packed = stock._load_adapter(request), ours._load_packed(request)
        assert (packed.id, packed.rank, set(packed.loras)) == (expected.id, expected.rank, set(expected.loras))
        assert len(packed.loras) == 4
        for name, lora in expected.loras.items():
            assert torch.equal(packed.loras[name].lora_a, lora.lora_a)
            assert torch.equal(packed.loras[name].lora_b, lora.lora_b)
            assert packed.loras[name].lora_a.dtype is served
            assert (packed.loras[name].scaling, packed.loras[name].rank) == (lora.scaling, lora.rank)


def test_what_is_not_plain_is_left_to_vllms_own_loader(loaders, make_lora, tmp_path):
    _, ours = loaders(torch.float32)
    mixed = shutil.copytree(make_lora(rank=8, seed=1), tmp_path / "mixed")
    tensors = load_file(mixed / "adapter_model.safetensors")
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first].to(torch.bfloat16)}, mixed / "adapter_model.safetensors")
    request = LoRARequest("mixed", 1, str(mixed))
    assert ours._load_packed(request) is None
    assert len(ours._load_adapter(request).loras) == 4


def test_an_adapter_above_the_engines_rank_is_refused(loaders, make_lora):
    _, ours = loaders(torch.float32)
    with pytest.raises(ValueError, match="max_lora_rank"):
        ours._load_adapter(LoRARequest("large", 1, str(make_lora(rank=32, seed=1))))
