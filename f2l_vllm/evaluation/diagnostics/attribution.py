"""Direct logit attribution: what each part of the model adds to the right answer's lead over wrong ones.

The residual stream at a position is the token's embedding plus what attention and MLP of every layer write into it.
The final norm divides by the stream's size, and the unembedding is linear. With that size held fixed at its value, the
lead of one token's logit is therefore a sum over these parts. The adapter's part of a layer is what its attention and
MLP write, minus what they would write for the same input without the adapter: for down_proj, exactly s B^T A x.

Shape suffixes: L text layers, T tokens of a prompt, D hidden size, W wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from f2l_vllm.base_models.text_layers import text_layers_of, text_model_of
from f2l_vllm.hypernetwork.adapter import Adapter, apply_adapter


@dataclass(frozen=True)
class Contest:
    """A position at which the right answer starts to differ from wrong ones.

    Attributes:
        ids_T: the prompt up to that position, with the words that all candidate answers begin with.
        right: the right answer's next token.
        wrong: the wrong candidates' next tokens; empty: the whole vocabulary stands for them.
    """

    ids_T: Tensor
    right: int
    wrong: tuple[int, ...]


@dataclass(frozen=True)
class Attribution:
    """Parts of the lead, the right token's logit minus the mean of the wrong ones'; they sum to it.

    Attributes:
        embedding: from the last prompt token itself.
        base_L: from the frozen weights of every layer, for the inputs that arise with the adapter.
        lora_L: from the adapter's update of every layer.
        lead: as the model computed it.
    """

    embedding: float
    base_L: Tensor
    lora_L: Tensor
    lead: float


def contest(processor: Any, question: str, truth: str, others: Sequence[str]) -> Contest:
    """The position where the true answer to a question starts to differ from the other candidates.

    Raises:
        ValueError: the chat template writes an answered question so that it does not start with the question's prompt.
    """
    asked = {"role": "user", "content": [{"type": "text", "text": question}]}
    prompt = _ids(processor, [asked], add_generation_prompt=True)

    def answered(text: str) -> list[int]:
        ids = _ids(processor, [asked, {"role": "assistant", "content": [{"type": "text", "text": text.strip()}]}])
        if ids[: len(prompt)] != prompt:
            raise ValueError(f"the model's chat template does not let an answer follow its prompt, e.g. {text!r}")
        return ids

    right = answered(truth)
    rivals = [answered(text) for text in sorted({text.strip() for text in others} - {truth.strip()})]
    split = len(prompt)
    while rivals and all(len(ids) > split + 1 and ids[split] == right[split] for ids in (right, *rivals)):
        split += 1
    wrong = {ids[split] for ids in rivals} - {right[split]}
    return Contest(torch.tensor(right[:split]), right[split], tuple(sorted(wrong)))


@torch.no_grad()
def attribute(model: nn.Module, adapter: Adapter, contest: Contest) -> Attribution:
    """Run the model with the adapter and split the lead into parts. Exact in fp32; in bf16 to bf16's precision."""
    text_model: Any = text_model_of(model)
    layers = text_layers_of(model)
    stream: dict[str, Tensor] = {}
    calls: list[list[tuple[nn.Module, Any, Any, Tensor]]] = [[] for _ in layers]

    def note(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs, out: calls[index].append((module, args, kwargs, _written(out)))

    def enter(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream["embedding"] = _last(args[0] if args else kwargs["hidden_states"])

    def end(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        stream["end"] = _last(args[0])

    with ExitStack() as hooks, apply_adapter(model, adapter):
        hooks.callback(layers[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(text_model.norm.register_forward_pre_hook(end).remove)
        for index, layer in enumerate(layers):
            for part in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
                hooks.callback(part.register_forward_hook(note(index), with_kwargs=True).remove)
        ids_1T = contest.ids_T[None].to(next(model.parameters()).device)
        logits_V = model(input_ids=ids_1T, use_cache=False).logits[0, -1].double()
    direction_D = _direction(model, contest, stream["end"])
    base, lora = [], []
    for layer_calls in calls:
        without = [_written(module(*args, **kwargs)) for module, args, kwargs, _ in layer_calls]
        base.append(sum(float(out @ direction_D) for out in without))
        lora.append(sum(float((call[3] - out) @ direction_D) for call, out in zip(layer_calls, without, strict=True)))
    wrong = logits_V[list(contest.wrong)] if contest.wrong else logits_V
    return Attribution(
        float(stream["embedding"] @ direction_D),
        torch.tensor(base),
        torch.tensor(lora),
        float(logits_V[contest.right] - wrong.mean()),
    )


def _direction(model: Any, contest: Contest, end_D: Tensor) -> Tensor:
    """The vector [D], in fp64, whose product with a vector of the residual stream is that vector's part of the lead."""
    rows_VD: Tensor = model.lm_head.weight
    wrong_D = rows_VD[list(contest.wrong)].double().mean(0) if contest.wrong else rows_VD.mean(0, dtype=torch.float64)
    norm: Any = text_model_of(model).norm
    size = (end_D.square().mean() + norm.variance_epsilon).sqrt()
    return norm.weight.double() * (rows_VD[contest.right].double() - wrong_D) / size


def _written(output: Any) -> Tensor:
    """What a layer's MLP, or its attention (which also returns its weights), writes at the last position."""
    return _last(output[0] if isinstance(output, tuple) else output)


def _last(hidden_1TD: Tensor) -> Tensor:
    return hidden_1TD[0, -1].double()


def _ids(processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> list[int]:
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    return list(processor.tokenizer.encode(text, add_special_tokens=False))  # the template writes them
