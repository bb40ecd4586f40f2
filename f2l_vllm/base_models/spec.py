"""What a family of vision-language models declares, so that adapters can be made for it and served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
_LLAMA_PATHS = {name: f"self_attn.{name}" for name in ATTENTION_MODULES} | {name: f"mlp.{name}" for name in MLP_MODULES}


def llama_sizes(text: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of each linear of a text layer laid out as Llama's, from the text model's configuration."""
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head_dim = text.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, text.get("num_key_value_heads", heads) * head_dim
    return {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


@dataclass(frozen=True)
class ReleasedSize:
    """The sizes of one released model.

    Attributes:
        name: the model's, short.
        text, vision: of the two parts of its configuration.
        tokens_per_frame: visual tokens.
    """

    name: str
    text: Mapping[str, int]
    vision: Mapping[str, int]
    tokens_per_frame: int


@dataclass(frozen=True)
class BaseModelSpec:
    """One family. Light: the functions that it names import torch or vLLM when they run.

    Shape suffixes: F frames, P visual tokens of a frame, D hidden size.

    Attributes:
        name: `model_type` in `config.json`.
        example: a hub id, for messages.
        text_config: key of `config.json` that holds the text model's sizes.
        text_model: the decoder stack (embeddings, layers, norm), as an attribute of the transformers model without its
            language-model head.
        peft_prefix: of a text layer's names in PEFT files, before the layer's number.
        prepare_frames: what the family's video processor makes of uint8 frames [F, H, W, 3] on any device, with the
            longest edge to scale to, or None for the processor's own.
        embed_frames: visual tokens [F, P, D] of one batch of frames, as `prepare_frames` makes it.
        frames_at_once: how many frames the vision tower takes, from the model's configuration.
        architecture: the class's name in transformers and in vLLM's registry of models.
        vllm_class: `module:class` with which vLLM serves it, with a `video` modality.
        video_processors: transformers classes whose sampling vLLM uses to decode this family's videos.
        random_model: processor and model of a released size, random weights in torch's default dtype, from a tokenizer
            and a chat template.
        hypernetworks: hub id of the released hypernetworks for this family; empty if there are none.
        released_for: hub ids of the base models that those hypernetworks were trained for.
        released_sizes: by names for the command line; a random hypernetwork for each is measured.
        known_sizes: the sizes that `recognised` reads from a configuration -> hub id.
        module_paths: target linear -> its path inside a text layer.
        module_sizes: target linear -> (d_in, d_out), from the text model's configuration.
    """

    name: str
    example: str
    text_config: str
    text_model: str
    peft_prefix: str
    prepare_frames: Callable[[Any, Tensor, int | None], Mapping[str, Tensor]]
    embed_frames: Callable[[nn.Module, Mapping[str, Any]], Tensor]
    frames_at_once: Callable[[Any], int]
    architecture: str
    vllm_class: str
    video_processors: tuple[str, ...]
    random_model: Callable[[ReleasedSize, Any, str], tuple[Any, nn.Module]]
    hypernetworks: str = ""
    released_for: tuple[str, ...] = ()
    released_sizes: Mapping[str, ReleasedSize] = field(default_factory=dict)
    known_sizes: Mapping[tuple[int, ...], str] = field(default_factory=dict)
    module_paths: Mapping[str, str] = field(default_factory=lambda: _LLAMA_PATHS)
    module_sizes: Callable[[Mapping[str, Any]], dict[str, tuple[int, int]]] = llama_sizes

    def recognised(self, config: Mapping[str, Any]) -> str | None:
        """The hub's model that a `config.json` is a copy of, recognised by its sizes: layers, hidden and intermediate
        size and heads of the text model, layers and width of the vision model."""
        text, vision = config[self.text_config], config["vision_config"]
        found = (
            *(text[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")),
            *(vision[name] for name in ("num_hidden_layers", "hidden_size")),
        )
        return self.known_sizes.get(found)
