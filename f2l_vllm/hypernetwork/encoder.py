"""The frozen vision-language model reads videos once; the inputs of its text layers are the hypernetwork's input.

Only what must grow with the number of frames does: one embedding per visual token, and a few hidden vectors per token
of one text layer. Frames are prepared and pass the vision tower a few at a time, the text layers' MLPs take a block of
tokens at a time, and a layer's features are passed on and not kept.

Shape suffixes: B batch (videos), L text layers, T tokens of the internalization message, D hidden size, F frames,
S pixels of a square frame, P visual tokens of a frame, V of all videos.

Source: Frames2LoRA (arXiv 2606.04351), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from f2l_vllm import torch_shims

torch_shims.install()

from transformers import BatchFeature  # noqa: E402  (torchvision must be importable first)

from f2l_vllm.base_models.merging import merge_tokens, tokens_of_frames, without_merged  # noqa: E402
from f2l_vllm.base_models.rate import check_rate  # noqa: E402
from f2l_vllm.base_models.registry import family_of  # noqa: E402
from f2l_vllm.base_models.text_layers import target_linear, text_layers_of, text_model_of  # noqa: E402
from f2l_vllm.hypernetwork.blocks import mlp_in_blocks  # noqa: E402
from f2l_vllm.hypernetwork.config import INSTRUCTION  # noqa: E402
from f2l_vllm.video.sample import SampledVideo  # noqa: E402

FRAMES_AT_ONCE = 16
SOURCE_BYTES_AT_ONCE = 1 << 26  # prepared at once, in the video's own size, which may be large

OnLayer = Callable[[int, Tensor], None]


class _AllLayersSeen(Exception):
    """Ends a forward pass where the last text layer would begin: nothing after its input is used."""


class VideoEncoder:
    """A transformers base model and its processor, used only to read videos. Not thread-safe: it hooks the model.

    Args:
        model: with or without its language-model head; it is frozen, and keeps its dtype and device.
        processor: the model's processor.
        merge_rate: part of the visual tokens to save before the text layers; `tokens` and `see` leave these out,
            `prepare` does not.

    Raises:
        ValueError: the rate is outside [0, 1).
    """

    def __init__(self, model: nn.Module, processor: Any, merge_rate: float = 0.0) -> None:
        self.model = model
        self.processor = processor
        self.family = family_of(model)
        self.layers = text_layers_of(model)
        self.merge_rate = check_rate(merge_rate)

    def tokens(self, sampled: SampledVideo) -> Tensor:
        """Token ids [T] of the internalization message: one user turn with the video and `INSTRUCTION`."""
        # The ids depend on how many frames there are and when, not on their pixels.
        blank = sampled.frames[:, :2, :2]
        ids = self._process(sampled, blank, {"do_resize": False})["input_ids"][0]
        if not self.merge_rate:
            return ids
        per_frame = self.num_visual_tokens(ids) // len(sampled.frames)
        counts = tokens_of_frames(len(sampled.frames), per_frame, self.merge_rate)
        return torch.tensor(without_merged(ids.tolist(), self._image_token_id, per_frame, counts))

    def prepare(self, sampled: SampledVideo) -> BatchFeature:
        """Token ids and all pixels of the internalization message, as `visit` and `features` take them.

        Returns:
            input_ids, attention_mask [1, T], pixel_values [1, F, 3, S, S] and whatever else the processor adds,
            on the CPU.
        """
        inputs = self._process(sampled, sampled.frames, _size_option(sampled))
        return BatchFeature({name: value for name, value in inputs.items() if isinstance(value, Tensor)})

    @torch.no_grad()
    def see(self, sampled: SampledVideo) -> Tensor:
        """The video's visual tokens [V, D] as they enter the text model; the memory grows only with V."""
        count = min(FRAMES_AT_ONCE, self._frames_at_once)
        starts = range(0, len(sampled.frames), count)
        frames = self._embed(self._prepared(sampled, slice(start, start + count)) for start in starts)
        if not self.merge_rate:
            return torch.cat([batch_FPD.flatten(0, 1) for batch_FPD in frames])
        return merge_tokens(frames, len(sampled.frames), self.merge_rate)

    @torch.no_grad()
    def read(self, ids: Sequence[Tensor], visual: Sequence[Tensor], on_layer: OnLayer) -> None:
        """Read several videos' messages in one pass; shorter ones are padded at their end.

        Args:
            ids: `tokens` of every video.
            visual: `see` of every video.
            on_layer: called with the index of each text layer and its input [B, T, D]. Padded positions, False in
                `pad_mask`, hold nothing of use.
        """
        mask_BT = pad_mask([len(one) for one in ids])
        ids_BT = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
        # Tokens only look back and padding comes last, so no real token sees padding. Attention therefore needs no
        # mask, which would take T * T numbers per video.
        self._run_text(ids_BT, mask_BT, torch.cat(list(visual)), on_layer, attention_mask=None)

    @torch.no_grad()
    def visit(self, inputs: BatchFeature, on_layer: OnLayer) -> None:
        """Call `on_layer(index, features [B, T, D])` with the input of each text layer, and keep none of them.

        The last layer itself, the final norm and the language-model head do not run, and no key or value is kept.

        Args:
            inputs: input_ids, attention_mask [B, T] and pixel_values [B, F, 3, S, S], where frames of zeros are
                padding; on any device. The features of padded positions are those that transformers computes.
            on_layer: takes the index and the features.
        """
        pixels_F3SS = inputs["pixel_values"].flatten(0, 1)
        real_F = (pixels_F3SS != 0).flatten(1).any(1)
        batches = ({"pixel_values": frames[None]} for frames in pixels_F3SS[real_F].split(self._frames_at_once))
        mask_BT = inputs["attention_mask"]
        visual_VD = torch.cat([batch_FPD.flatten(0, 1) for batch_FPD in self._embed(batches)])
        mask_on_device = mask_BT.to(next(self.model.parameters()).device)
        self._run_text(inputs["input_ids"], mask_BT, visual_VD, on_layer, mask_on_device)

    def features(self, inputs: BatchFeature) -> tuple[Tensor, Tensor]:
        """The inputs of all text layers.

        Args:
            inputs: as `visit` takes them.

        Returns:
            features [B, L, T, D] in the model's dtype and mask [B, T], True where a token is real.
        """
        collected: list[Tensor] = []
        self.visit(inputs, lambda _, features_BTD: collected.append(features_BTD))
        return torch.stack(collected, dim=1), inputs["attention_mask"].to(collected[0].device).bool()

    def _prepared(self, sampled: SampledVideo, which: slice) -> Mapping[str, Tensor]:
        """Some frames as the vision tower takes them, made from no more of the video at a time than memory is for."""
        frames_FHW3 = torch.from_numpy(sampled.frames[which])
        at_once = max(1, SOURCE_BYTES_AT_ONCE * len(frames_FHW3) // frames_FHW3.nbytes)
        device = next(self.model.parameters()).device
        processor, edge = self.processor.video_processor, sampled.sampling.longest_edge
        # As bytes to the device, which is a quarter of what they become there. The copy waits for a GPU, so that no
        # more than one part is queued.
        parts = [self.family.prepare_frames(processor, part.to(device), edge) for part in frames_FHW3.split(at_once)]
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}

    def num_visual_tokens(self, ids: Tensor) -> int:
        """How many of these token ids stand for a piece of a frame."""
        return int((ids == self._image_token_id).sum())

    @property
    def _image_token_id(self) -> int:
        config: Any = self.model.config
        return config.image_token_id

    @property
    def _frames_at_once(self) -> int:
        return self.family.frames_at_once(self.model.config)

    def _process(self, sampled: SampledVideo, frames_F: Any, options: dict[str, Any]) -> BatchFeature:
        message = {
            "role": "user",
            "content": [{"type": "video", "video": frames_F}, {"type": "text", "text": INSTRUCTION}],
        }
        return self.processor.apply_chat_template(
            [message],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_sample_frames": False, "video_metadata": [[sampled.metadata]], **options},
        )

    def _embed(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
        """Visual tokens [F, P, D] of each batch of frames; the frames hold no padding."""
        for batch in batches:
            yield self.family.embed_frames(self.model, batch)

    def _run_text(
        self, ids_BT: Tensor, mask_BT: Tensor, visual_VD: Tensor, on_layer: OnLayer, attention_mask: Tensor | None
    ) -> None:
        text_model: Any = text_model_of(self.model)
        # Where the ids and the mask are, usually on the CPU: a GPU is not waited for.
        places_V = ((ids_BT == self._image_token_id) & mask_BT.bool()).flatten().nonzero().squeeze(1)
        if len(places_V) != len(visual_VD):
            raise ValueError(
                f"The message has {len(places_V)} places for visual tokens, but the frames give "
                f"{len(visual_VD)}: the processor and the model do not belong together."
            )
        device = visual_VD.device
        embeds_BTD = text_model.get_input_embeddings()(ids_BT.to(device))
        embeds_BTD.view(-1, embeds_BTD.shape[-1])[places_V.to(device)] = visual_VD.to(embeds_BTD.dtype)
        last = len(self.layers) - 1

        def hook(index: int) -> Callable[..., None]:
            def enter(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                on_layer(index, args[0] if args else kwargs["hidden_states"])
                if index == last:
                    raise _AllLayersSeen

            return enter

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
                stack.enter_context(_in_blocks(layer, target_linear(self.model, layer, "down_proj").in_features))
            try:
                text_model(inputs_embeds=embeds_BTD, attention_mask=attention_mask, use_cache=False)
            except _AllLayersSeen:
                return
        raise AssertionError(f"{type(text_model).__name__} did not run its layers")


def pad_mask(lengths: Sequence[int]) -> Tensor:
    """[B, T], True in the first `lengths[b]` positions of row b."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _size_option(sampled: SampledVideo) -> dict[str, Any]:
    edge = sampled.sampling.longest_edge
    return {} if edge is None else {"size": {"longest_edge": edge}}


@contextmanager
def _in_blocks(layer: nn.Module, hidden_size: int) -> Iterator[None]:
    """Within the block, the layer's MLP takes a block of tokens at a time."""
    mlp: Any = layer.mlp
    forward = mlp.forward
    before = vars(mlp).get("forward")
    mlp.forward = partial(mlp_in_blocks, forward, hidden_size=hidden_size)
    try:
        yield
    finally:
        if before is None:
            del mlp.forward
        else:
            mlp.forward = before
