"""Which visual tokens are dropped, by hand and by vLLM's own function, and what a model reads without them."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from f2l_vllm import models
from f2l_vllm.base_models.dropping import evs_mask, mean_tokens, most_varied, stages, variation_dropping
from f2l_vllm.base_models.text_layers import text_layers_of, text_model_of


def test_evs_keeps_the_first_frame_and_then_what_differs_most_from_the_frame_before():
    right, up, left = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    frames = torch.tensor([[right, right], [right, up], [left, up]])  # changes: 0 and 1, then 2 and 0
    assert evs_mask(frames, 1.0).tolist() == [True] * 6
    assert evs_mask(frames, 4 / 6).tolist() == [True, True, False, True, True, False]
    assert evs_mask(frames, 0.5).tolist() == [True, True, False, False, True, False]
    assert evs_mask(frames, 0.01).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.75, 0.9])
def test_evs_keeps_the_tokens_that_vllm_0_32_keeps(rate):
    from vllm.multimodal.video_prune.evs import compute_retention_mask

    frames, edge = 7, 4
    tokens = torch.randn(frames, edge * edge, 24, generator=torch.Generator().manual_seed(3))
    tokens[4] = tokens[3]  # ties
    theirs = compute_retention_mask(tokens.flatten(0, 1), (frames, edge, edge), 1, rate)
    assert torch.equal(evs_mask(tokens, 1 - rate), theirs)


def test_the_tokens_that_changed_most_stay_in_their_order():
    before = torch.zeros(4, 2)
    now = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [0.6, 0.8]])  # by 5, 1, 10 and 1
    assert most_varied(before, now, 2).tolist() == [0, 2]
    assert most_varied(before, now, 3).tolist() == [0, 1, 2]


def test_stages_have_the_papers_depths_and_end_at_the_keep_rate():
    assert stages(32, 800, 0.125) == {3: 400, 17: 200, 22: 100}
    assert list(stages(24, 81, 0.5)) == [2, 13, 16]
    assert stages(4, 8, 0.001) == {1: 1, 2: 1, 3: 1}
    assert mean_tokens(32, 800, 0.125) == (3 * 800 + 14 * 400 + 5 * 200 + 10 * 100) / 32
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        stages(32, 800, 0.0)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(models.resolve("f2l-tiny"), dtype=torch.float32).eval()


def prompt():
    """A prompt of 24 tokens, and where it is taken to hold visual ones; the model reads any."""
    ids = torch.randint(10, 800, (1, 24), generator=torch.Generator().manual_seed(1))
    visual = torch.zeros(24, dtype=torch.bool)
    visual[4:20] = True
    return ids, visual


@torch.no_grad()
def test_layers_read_what_is_kept_at_its_own_place(model):
    """Against the layers called one by one, each with the tokens that it reads."""
    ids, visual = prompt()
    text, layers = text_model_of(model), text_layers_of(model)
    hidden = text.get_input_embeddings()(ids)
    kept, before = torch.arange(24), None
    for index, layer in enumerate(layers):
        if index:
            change = (hidden[0] - before[0]).norm(dim=-1).masked_fill(~visual[kept], torch.inf)
            stays = change.argsort(descending=True)[: 8 + {1: 10, 2: 6, 3: 4}[index]].sort().values
            kept, hidden = kept[stays], hidden[:, stays]
        before = hidden
        hidden = layer(hidden, position_embeddings=text.rotary_emb(hidden, kept[None]), attention_mask=None)
    with variation_dropping(model, visual, 0.25):
        found = text(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, text.norm(hidden), atol=1e-5, rtol=1e-4)
    assert found.shape[1] == 8 + 4


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_answer_is_the_same_with_and_without_a_cache(model, attention):
    ids, visual = prompt()
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with variation_dropping(model, visual, 0.25):
        cached = model.generate(input_ids=ids, **options)[0, 24:].tolist()
    assert cached != model.generate(input_ids=ids, **options)[0, 24:].tolist()
    with variation_dropping(model, visual, 1.0):
        everything = model.generate(input_ids=ids, **options)[0, 24:].tolist()
    assert everything == model.generate(input_ids=ids, **options)[0, 24:].tolist()
    for count in range(6):
        longer = torch.cat([ids, torch.tensor([cached[:count]], dtype=torch.long)], 1)
        with variation_dropping(model, torch.cat([visual, torch.zeros(count, dtype=torch.bool)]), 0.25):
            assert int(model(input_ids=longer, use_cache=False).logits[0, -1].argmax()) == cached[count]


def test_several_prompts_at_a_time_are_refused(model):
    ids, visual = prompt()
    with variation_dropping(model, visual, 0.5), pytest.raises(ValueError, match="one prompt at a time"):
        model(input_ids=ids.repeat(2, 1))
