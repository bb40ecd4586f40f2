"""SmolVLM for vLLM with a native `video` modality, as in transformers; vLLM's own class takes images only.

A video is N frames, each resized to the model's square and never split, in a prompt that states their number, the
video's length and each frame's time. transformers' own processor makes the prompt and the pixels, so that they equal
those that transformers, and with it internalization, computes from the same frames.

Under vLLM's `--video-pruning-rate` a video's tokens are merged from frame to frame (`base_models/merging.py`). The
number that each frame keeps does not depend on the content: the text about the video, and each frame's time before its
tokens, stay where they are, and the prompt is known before the vision tower has run. In models where the number depends
on the content (Nemotron, Qwen3-VL), the prompt counts all tokens towards the first frame, and the model moves the text
between frames into place as embeddings, so that it reads something else than the token ids. SmolVLM counts positions
along the prompt, so it does not need vLLM's interface `SupportsMultiModalPruning`, for positions that depend on which
tokens are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.smolvlm import (
    SmolVLMDummyInputsBuilder,
    SmolVLMForConditionalGeneration,
    SmolVLMMultiModalProcessor,
    SmolVLMProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser, VideoProcessorItems
from vllm.multimodal.processing import BaseDummyInputsBuilder, PromptReplacement, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.processor import MultiModalPromptUpdates, PlaceholderFeaturesInfo, ResolvedPromptUpdate

from f2l_vllm.base_models.merging import merge_tokens, tokens_of_frames, without_merged
from f2l_vllm.base_models.smolvlm import SPEC
from f2l_vllm.engine.base_models import video_loader

video_loader.decode_videos_of(SPEC.video_processors)

_FRAMES_PER_CALL = 32  # of the vision tower, whose memory grows with the number of frames per call
_METADATA_FIELDS = {field.name for field in fields(VideoMetadata)}


class SmolVLMVideoProcessingInfo(SmolVLMProcessingInfo):
    """Answers vLLM's questions about the model's inputs before there are any."""

    @property
    def merge_rate(self) -> float:
        """Part of a video's tokens to save."""
        return self.ctx.get_mm_config().video_pruning_rate or 0.0

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {**super().get_supported_mm_limits(), "video": None}

    def get_data_parser(self) -> MultiModalDataParser:
        return MultiModalDataParser(
            video_needs_metadata=True,
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Number of embeddings of the largest image and video; a video may fill the context, whatever the sampler's
        default."""
        processor = self.get_hf_processor()
        side = processor.image_processor.size["longest_edge"]
        largest = {
            "image": self.get_num_image_tokens(image_width=side, image_height=side, processor=processor, mm_kwargs={}),
            "video": max(1, seq_len // processor.image_seq_len) * processor.image_seq_len,
        }
        return {modality: largest[modality] for modality in mm_counts}


class SmolVLMVideoDummyInputsBuilder(SmolVLMDummyInputsBuilder):
    """Inputs of the largest usual size; vLLM measures memory and warms up with them."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return super().get_dummy_text(mm_counts) + "<video>" * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        data = dict(super().get_dummy_mm_data(seq_len, mm_counts, mm_options))
        processor = self.info.get_hf_processor()
        sampler = processor.video_processor
        side = sampler.max_image_size["longest_edge"]
        num_videos = mm_counts.get("video", 0)
        # The text around a frame has about as many tokens as a frame of the smallest model.
        fitting = seq_len // max(1, num_videos) // (2 * processor.image_seq_len)
        videos = self._get_dummy_videos(
            width=side,
            height=side,
            num_frames=max(1, min(sampler.num_frames or fitting, fitting)),
            num_videos=num_videos,
            overrides=mm_options.get("video"),
        )
        data["video"] = [(video, _dummy_metadata(len(video))) for video in videos]
        return data


class SmolVLMVideoMultiModalProcessor(SmolVLMMultiModalProcessor):
    """Turns images and sampled videos into pixels, and their placeholders in the prompt into tokens."""

    def __init__(
        self, info: SmolVLMVideoProcessingInfo, dummy_inputs: BaseDummyInputsBuilder[SmolVLMVideoProcessingInfo]
    ) -> None:
        super().__init__(info, dummy_inputs)
        video_loader.SampledVideoLoader.use_processor(info.get_hf_processor, self._resize)

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        data, kwargs, passthrough = self._get_hf_mm_inputs(mm_items, hf_kwargs)
        videos: Any = data.pop("videos", [])
        processed = self._call_hf_processor(data, kwargs) if data else None
        processed = self._finalize_hf_mm_data(data, kwargs, passthrough, processed)
        if videos:
            processed.update(self._process_videos(videos, hf_kwargs))
        return processed

    def _video_options(self, hf_kwargs: Mapping[str, object]) -> dict[str, Any]:
        scopes: Any = self.info._merge_and_resolve_mm_processor_kwargs(hf_kwargs)
        return {**scopes.get("videos_kwargs", {}), "do_sample_frames": False, "return_tensors": "pt"}

    def _resize(self, frames_NHW3: np.ndarray) -> np.ndarray:
        """Frames as the video processor resizes them, before its other steps."""
        processor = self.info.get_hf_processor().video_processor
        alone = {"do_rescale": False, "do_normalize": False, "do_pad": False}
        pixels_N3HW: torch.Tensor = processor(videos=[frames_NHW3], **{**self._video_options({}), **alone})[
            "pixel_values"
        ][0]
        return pixels_N3HW.permute(0, 2, 3, 1).numpy()

    def _process_videos(
        self, videos: Sequence[tuple[Any, Mapping[str, Any]]], hf_kwargs: Mapping[str, object]
    ) -> dict[str, torch.Tensor]:
        """Pixels `[all frames, 3, side, side]`, their masks `[all frames, side, side]` and each video's frame count."""
        processor = self.info.get_hf_processor(**hf_kwargs).video_processor
        options = self._video_options(hf_kwargs)
        resized = [bool(metadata.get("resized")) for _, metadata in videos]
        if any(resized) and options != self._video_options({}):
            raise ValueError("The video is large, and was resized as the server is set: leave out mm_processor_kwargs.")
        # One video at a time: together they would be padded to the longest.
        outputs = [
            processor(videos=[frames], **{**options, **({"do_resize": False} if small else {})})
            for (frames, _), small in zip(videos, resized, strict=True)
        ]
        dtype = self.info.ctx.model_config.dtype
        return {
            "pixel_values_videos": torch.cat([output["pixel_values"][0] for output in outputs]).to(dtype),
            # The processor's have eight bytes a pixel, more than the pixels themselves in bf16.
            "pixel_attention_mask_videos": torch.cat([output["pixel_attention_mask"][0].bool() for output in outputs]),
            "num_frames": torch.tensor([output["pixel_values"].shape[1] for output in outputs]),
        }

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        num_frames = hf_inputs.get("num_frames", torch.empty(0))
        return {
            **super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs),
            "pixel_values_videos": MultiModalFieldConfig.flat_from_sizes("video", num_frames),
            "pixel_attention_mask_videos": MultiModalFieldConfig.flat_from_sizes("video", num_frames),
            "num_frames": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        tokenizer = self.info.get_tokenizer()

        def frames_of(index: int) -> PromptUpdateDetails:
            frames, metadata = mm_items.get_items("video", VideoProcessorItems).get(index)
            text = processor.replace_video_token(
                {
                    "pixel_values": torch.empty(1, len(frames), 0),
                    "video_metadata": [_as_metadata(metadata, len(frames))],
                },
                video_idx=0,
            )
            ids = tokenizer.encode(text, add_special_tokens=False)
            if self.info.merge_rate:
                counts = tokens_of_frames(len(frames), processor.image_seq_len, self.info.merge_rate)
                ids = without_merged(ids, processor.image_token_id, processor.image_seq_len, counts)
            return PromptUpdateDetails.select_token_id(ids, processor.image_token_id)

        video = PromptReplacement(
            modality="video",
            target=tokenizer.encode(processor.video_token, add_special_tokens=False),
            replacement=frames_of,
        )
        return [*super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs), video]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: MultiModalPromptUpdates
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """Write videos into the prompt as text and tokenize the whole prompt again, as transformers does.

        Words before and after a video share tokens with its introduction and its end ("User:" and " You"), so neither
        the mark nor the written-out video is a separate token sequence. The part from the first frame's opening mark to
        the last frame's closing mark is one, because these are special tokens; that part is the placeholder.
        """
        if not mm_prompt_updates.get("video"):
            return super()._apply_prompt_updates(token_ids, mm_prompt_updates)
        new_ids, matches = self._apply_prompt_updates_via_text(token_ids, mm_prompt_updates)
        matched = self._matched_updates_from_result(mm_prompt_updates, matches)
        fence = self.info.get_tokenizer().convert_tokens_to_ids(self.info.get_hf_processor().fake_image_token)
        matched["video"] = [[_between(update, fence) for update in updates] for updates in matched["video"]]
        return new_ids, self._find_mm_placeholders(new_ids, matched)


@MULTIMODAL_REGISTRY.register_processor(
    SmolVLMVideoMultiModalProcessor,
    info=SmolVLMVideoProcessingInfo,
    dummy_inputs=SmolVLMVideoDummyInputsBuilder,
)
class SmolVLMVideoForConditionalGeneration(SmolVLMForConditionalGeneration):
    """vLLM's SmolVLM, whose vision tower also reads the frames of videos."""

    # Merging takes the name of vLLM's default method, because it keeps the same number of tokens; vLLM refuses others.
    supported_video_pruning_methods = ("evs",)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.merge_rate = vllm_config.model_config.multimodal_config.video_pruning_rate or 0.0

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<video>" if modality.startswith("video") else super().get_placeholder_str(modality, i)

    def _mark_tower_model(
        self, vllm_config: VllmConfig, modalities: set[str] | str, *, targets: Any = None
    ) -> AbstractContextManager[None]:
        # The tower serves both modalities, so it may be left out only if neither is allowed.
        return super()._mark_tower_model(vllm_config, {"image", "video"}, targets=targets)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """One tensor `[embeddings, hidden]` per image or video of the batch."""
        if "pixel_values_videos" not in kwargs:
            return super().embed_multimodal(**kwargs)
        pixels, masks = kwargs["pixel_values_videos"], kwargs["pixel_attention_mask_videos"]
        num_frames = kwargs["num_frames"].tolist()
        if self.merge_rate:
            videos = zip(pixels.split(num_frames), masks.split(num_frames), num_frames, strict=True)
            return [merge_tokens(self._see(some, mask), frames, self.merge_rate) for some, mask, frames in videos]
        frames = torch.cat(list(self._see(pixels, masks)))
        return [video.flatten(0, 1) for video in frames.split(num_frames)]

    def _see(self, pixels: torch.Tensor, masks: torch.Tensor) -> Iterator[torch.Tensor]:
        """Tokens `[frames, tokens of one, hidden]` of a few frames at a time."""
        for some, mask in zip(pixels.split(_FRAMES_PER_CALL), masks.split(_FRAMES_PER_CALL), strict=True):
            yield self.model.connector(self.model.image_pixels_to_features(some, mask, remove_padding=False))


def _between(update: ResolvedPromptUpdate, fence: int) -> ResolvedPromptUpdate:
    """`update` with its content cut to the part from the first to the last `fence` token, both included."""
    ids = update.content.full
    first, last = ids.index(fence), len(ids) - 1 - ids[::-1].index(fence)
    return replace(update, content=replace(update.content, full=ids[first : last + 1]))


def _as_metadata(given: Mapping[str, Any], num_frames: int) -> VideoMetadata:
    known = {name: value for name, value in given.items() if name in _METADATA_FIELDS}
    known.setdefault("total_num_frames", num_frames)
    if known.get("frames_indices") is None:
        known["frames_indices"] = list(range(num_frames))
    return VideoMetadata(**known)


def _dummy_metadata(num_frames: int) -> dict[str, Any]:
    return {
        "total_num_frames": num_frames,
        "fps": 1.0,
        "duration": float(num_frames),
        "frames_indices": list(range(num_frames)),
    }
