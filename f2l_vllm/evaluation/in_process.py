"""Answers from transformers and the hypernetwork in this process, without a server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from transformers import BatchFeature

from f2l_vllm import models
from f2l_vllm.base_models.dropping import evs_mask, mean_tokens, variation_dropping
from f2l_vllm.base_models.merging import tokens_of_frames, without_merged
from f2l_vllm.base_models.text_layers import check_length, text_layers_of
from f2l_vllm.evaluation.questions import (
    ADAPTER,
    DROPPING_ARMS,
    EVS,
    FRAMES,
    NONE,
    V2DROP,
    WRONG_VIDEO,
    Ask,
    Clip,
    Reply,
    Skipped,
    by_video_read,
    chunks_of,
)
from f2l_vllm.evaluation.server import OnReply, OnSkip
from f2l_vllm.hypernetwork.adapter import Adapter, apply_adapter
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.video.chunks import Chunking
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.reading import ReadingOptions
from f2l_vllm.video.sample import SampledVideo, Sampling, open_source, sample_video

_AT_ONCE = 12  # questions of one video answered together


class TransformersAnswers:
    """Gives greedy answers, to all questions about a video together.

    Args:
        reading: how videos are read, in context and in internalization.
        max_tokens: limit of an answer.
        keep_rate: part of the visual tokens that the arms which drop some keep.

    Raises:
        ValueError: no such model or hypernetwork, the two do not fit together, or the rate is outside [0, 1).
    """

    def __init__(
        self, model: str, hypernetwork: str | None, reading: ReadingOptions, *, max_tokens: int, keep_rate: float = 1.0
    ) -> None:
        directory, weights = models.resolve(model), models.resolve_hypernetwork(model, hypernetwork)
        in_fp32 = model in models.shipped() and not torch.cuda.is_available()  # as the server runs it
        dtype = torch.float32 if in_fp32 else None
        self.internalizer = Internalizer.load(directory, weights, dtype=dtype, reading=reading)
        self._model = cast(Any, self.internalizer.model)  # transformers leaves `generate` untyped
        self._processor = self.internalizer.processor
        self._processor.tokenizer.padding_side = "left"
        self._max_tokens, self._keep_rate = max_tokens, keep_rate

    @torch.no_grad()
    def answer(self, asks: Sequence[Ask], on_reply: OnReply, on_skip: OnSkip) -> None:
        """Answer everything; each video is watched once for each arm that needs it.

        Args:
            on_reply: called with every answer.
            on_skip: called for every video that cannot be used, with its reason.
        """
        for clip, about in by_video_read(asks):
            adapter: Adapter | None = None  # of the whole video, as two arms use it
            for arm in dict.fromkeys(ask.arm for ask in about):
                some = [ask for ask in about if ask.arm == arm]
                try:
                    if arm == NONE:
                        replies = self.replies(some)
                    elif arm in (FRAMES, *DROPPING_ARMS):
                        replies = self.replies(some, video=self._sample(clip), drop=arm)
                    elif arm in (ADAPTER, WRONG_VIDEO):
                        adapter = adapter or self.internalizer.internalize(clip.path)
                        replies = self.replies(some, adapter)
                    else:
                        count = chunks_of(arm)
                        assert count is not None  # `plan` knows no other arm
                        replies = self.replies(some, self._compose(clip, count))
                except VideoError as error:
                    on_skip(Skipped(clip.id, f"{error.code}: {error.message}", arm))
                    continue
                for ask, reply in zip(some, replies, strict=True):
                    on_reply(ask, reply)

    @torch.no_grad()
    def replies(
        self,
        asks: Sequence[Ask],
        adapter: Adapter | None = None,
        video: SampledVideo | None = None,
        drop: str = FRAMES,
    ) -> list[Reply]:
        """Answer all questions in one way: with an adapter, with a video's frames in context, or with neither.

        Args:
            drop: one of `DROPPING_ARMS`: which of the video's tokens are left out.

        Raises:
            VideoError: `video_too_long`: the frames do not fit into the model's context.
        """
        found: list[Reply] = []
        at_once = 1 if drop == V2DROP else _AT_ONCE  # other questions' tokens are dropped elsewhere
        for first in range(0, len(asks), at_once):
            found += self._together(asks[first : first + at_once], adapter, video, drop)
        return found

    def _sample(self, clip: Clip) -> SampledVideo:
        sampling = Sampling(self.internalizer.sampling.max_frames)
        return sample_video(clip.path, self._processor, self.internalizer.limits, sampling)

    def _compose(self, clip: Clip, chunks: int) -> Adapter:
        """The adapter of a video cut into `chunks` chunks of equal length."""
        info = open_source(clip.path, self.internalizer.limits).info
        chunking = Chunking(seconds=info.frame_count / info.fps / chunks, max_chunks=chunks)
        return self.internalizer.internalize(clip.path, chunking=chunking)

    def _together(
        self, asks: Sequence[Ask], adapter: Adapter | None, video: SampledVideo | None, drop: str
    ) -> list[Reply]:
        started = time.perf_counter()
        texts = [self._prompt(ask.question.text, with_video=video is not None) for ask in asks]
        if video is None:
            inputs = self._processor.tokenizer(texts, return_tensors="pt", padding=True)
        else:
            inputs = self._processor(
                text=texts,
                videos=[[video.frames]] * len(texts),
                video_metadata=[[video.metadata]] * len(texts),
                do_sample_frames=False,
                return_tensors="pt",
                padding=True,
            )
        inputs = inputs.to(self._model.device)
        if video is not None and (self.internalizer.encoder.merge_rate or drop == EVS):
            inputs = self._fewer(inputs, video, drop)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        self._check_length(int(inputs["attention_mask"].sum(1).max()), video)
        with ExitStack() as stack:
            if adapter is not None:
                stack.enter_context(apply_adapter(self._model, adapter))
            if drop == V2DROP:
                visual_T = inputs["input_ids"][0] == self._model.config.image_token_id
                stack.enter_context(variation_dropping(self._model, visual_T, self._keep_rate))
            output = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        answers = self._processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        seconds = (time.perf_counter() - started) / len(asks)
        visual = (inputs["input_ids"] == self._model.config.image_token_id).sum(1).tolist()
        prompt = inputs["attention_mask"].sum(1).tolist()
        if drop == V2DROP:  # a prompt of as many tokens as a layer reads
            read = [round(mean_tokens(len(text_layers_of(self._model)), seen, self._keep_rate)) for seen in visual]
            prompt = [tokens - seen + less for tokens, seen, less in zip(prompt, visual, read, strict=True)]
            visual = read
        return [
            Reply(text.strip(), tokens, seen, None, seconds)
            for text, tokens, seen in zip(answers, prompt, visual, strict=True)
        ]

    def _check_length(self, tokens: int, video: SampledVideo | None) -> None:
        try:
            check_length(self._model, tokens, self._max_tokens)
        except ValueError as error:
            if video is None:
                raise
            raise VideoError("video_too_long", str(error)) from error

    def _fewer(self, inputs: BatchFeature, video: SampledVideo, drop: str) -> BatchFeature:
        """The same prompts with the video's tokens as embeddings: merged, or those that EVS keeps."""
        encoder, image = self.internalizer.encoder, self._model.config.image_token_id
        visual = encoder.see(video)
        per_frame = self._processor.image_seq_len
        if drop == EVS:
            kept = evs_mask(visual.unflatten(0, (-1, per_frame)), self._keep_rate)
            visual, counts = visual[kept], kept.view(-1, per_frame).sum(1).tolist()
        else:
            counts = tokens_of_frames(len(video.frames), per_frame, encoder.merge_rate)
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        rows = [without_merged(row, image, per_frame, counts) for row in rows]
        merged = self._processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self._model.device)
        embeds = self._model.get_input_embeddings()(merged["input_ids"])
        embeds[merged["input_ids"] == image] = visual.to(embeds.dtype).repeat(len(rows), 1)
        return BatchFeature({**merged, "inputs_embeds": embeds})

    def _prompt(self, question: str, *, with_video: bool) -> str:
        parts = [{"type": "video"}] if with_video else []
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        prompt: str = self._processor.tokenizer.apply_chat_template(
            [message], chat_template=self._processor.chat_template, add_generation_prompt=True, tokenize=False
        )
        return prompt
