"""The parts of a lead sum to what the model computed, whatever modules the adapter touches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from f2l_vllm import models
from f2l_vllm.base_models.text_layers import module_sizes
from f2l_vllm.evaluation.diagnostics.attribution import attribute, contest
from f2l_vllm.hypernetwork.adapter import Adapter, apply_adapter

LAYERS = 4


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(models.resolve("f2l-tiny"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(models.resolve("f2l-tiny"))


def random_adapter(model: torch.nn.Module, *modules: str) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: (
            torch.randn(LAYERS, 3, d_in, generator=generator) / d_in**0.5,
            torch.randn(LAYERS, 3, d_out, generator=generator) * 0.2,
        )
        for name, (d_in, d_out) in module_sizes(model, modules).items()
    }
    return Adapter(factors, scale=2.0)


@pytest.mark.parametrize("modules", [("down_proj",), ("o_proj", "v_proj", "gate_proj", "down_proj")])
@pytest.mark.parametrize("wrong", [("Blue.", "Green."), ()])
def test_embedding_frozen_weights_and_adapter_sum_to_the_lead(model, processor, modules, wrong) -> None:
    asked = contest(processor, "What colour is the circle?", "Red.", wrong)
    adapter = random_adapter(model, *modules)
    parts = attribute(model, adapter, asked)
    with apply_adapter(model, adapter), torch.no_grad():
        logits_V = model(input_ids=asked.ids_T[None]).logits[0, -1]
    lead = logits_V[asked.right] - (logits_V[list(asked.wrong)] if wrong else logits_V).mean()
    assert parts.lead == pytest.approx(float(lead), abs=1e-4)
    assert parts.embedding + float(parts.base_L.sum() + parts.lora_L.sum()) == pytest.approx(parts.lead, abs=1e-3)
    assert parts.lora_L.abs().min() > 1e-5


def test_the_adapters_part_is_its_update_of_the_layers_input(model, processor) -> None:
    """For down_proj: s B^T A x, normed at the final stream's size and unembedded."""
    asked = contest(processor, "How many shapes are there?", "One.", ["Two."])
    adapter = random_adapter(model, "down_proj")
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.model.text_model.layers[2].mlp.down_proj.register_forward_pre_hook(
            lambda _, args: seen.update(x=args[0])
        ),
        model.model.text_model.norm.register_forward_pre_hook(lambda _, args: seen.update(end=args[0])),
    ]
    with apply_adapter(model, adapter), torch.no_grad():
        model(input_ids=asked.ids_T[None])
    for hook in hooks:
        hook.remove()
    a_LRI, b_LRO = adapter.factors["down_proj"]
    update_D = adapter.scale * b_LRO[2].T @ (a_LRI[2] @ seen["x"][0, -1])
    end_D = seen["end"][0, -1]
    normed_D = model.model.text_model.norm.weight * update_D / (end_D.square().mean() + 1e-5).sqrt()
    logits_V = (model.lm_head.weight @ normed_D).detach()
    expected = float(logits_V[asked.right] - logits_V[asked.wrong[0]])
    assert attribute(model, adapter, asked).lora_L[2].item() == pytest.approx(expected, abs=1e-4)


def test_no_adapter_no_part(model, processor) -> None:
    silent = random_adapter(model, "down_proj")
    silent.factors = {name: (a, b * 0) for name, (a, b) in silent.factors.items()}
    parts = attribute(model, silent, contest(processor, "What is the background?", "Black.", ["White."]))
    assert parts.lora_L.tolist() == [0.0] * LAYERS


def test_answers_part_at_their_first_word_or_after_the_words_they_share(processor) -> None:
    def word(ids) -> str:
        return processor.tokenizer.decode(ids).strip()

    colours = contest(processor, "What colour is the circle?", "Red.", ["Blue.", "Red.", "Green."])
    assert word(colours.ids_T).endswith("Assistant:")
    assert word(colours.right) == "Red"
    assert {word(token) for token in colours.wrong} == {"Blue", "Green"}
    actions = contest(processor, "What does the circle do?", "It grows.", ["It moves left.", "It moves up."])
    assert word(actions.ids_T).endswith("Assistant: It")
    assert word(actions.right) == "grows"
    assert [word(token) for token in actions.wrong] == ["moves"]
    alone = contest(processor, "What colour is the circle?", "Red.", [])
    assert alone.wrong == ()
    assert word(alone.ids_T).endswith("Assistant:")


def test_an_answer_that_cannot_follow_its_prompt_is_refused(processor) -> None:
    template = "{% for message in messages | reverse %}{{ message['content'][0]['text'] }}{% endfor %}"
    answer_first = SimpleNamespace(tokenizer=processor.tokenizer, chat_template=template)
    with pytest.raises(ValueError, match="chat template"):
        contest(answer_first, "What colour is the circle?", "Red.", [])
