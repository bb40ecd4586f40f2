"""Answers from transformers and the hypernetwork in this process, without a server."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria

from f2l_vllm import models
from f2l_vllm.base_models.dropping import evs_mask, mean_tokens, variation_dropping
from f2l_vllm.base_models.merging import tokens_of_frames, without_merged
from f2l_vllm.base_models.text_layers import check_length, text_layers_of
from f2l_vllm.evaluation.questions import (
    ADAPTER,
    CACHED,
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


class _FirstToken(StoppingCriteria):
    """Notes when the first token is there, and stops nothing. `started`: when the question was asked, in seconds."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.milliseconds: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if self.milliseconds is None:
            self.milliseconds = (time.perf_counter() - self.started) * 1e3
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TransformersAnswers:
    """Gives greedy answers, to all questions about a video together.

    Args:
        reading: how videos are read, in context and in internalization.
        max_tokens: limit of an answer.
        keep_rate: part of the visual tokens that the arms which drop some keep.
        one_by_one: answer each question alone and time its first token. With the frames in context that includes
            decoding the video; with the adapter, or the frames' keys and values, these are there before.

    Raises:
        ValueError: no such model or hypernetwork, the two do not fit together, or the rate is outside [0, 1).
    """

    def __init__(
        self,
        model: str,
        hypernetwork: str | None,
        reading: ReadingOptions,
        *,
        max_tokens: int,
        keep_rate: float = 1.0,
        one_by_one: bool = False,
    ) -> None:
        directory, weights = models.resolve(model), models.resolve_hypernetwork(model, hypernetwork)
        in_fp32 = model in models.shipped() and not torch.cuda.is_available()  # as the server runs it
        dtype = torch.float32 if in_fp32 else None
        self.internalizer = Internalizer.load(directory, weights, dtype=dtype, reading=reading)
        self._model = cast(Any, self.internalizer.model)  # transformers leaves `generate` untyped
        self._processor = self.internalizer.processor
        self._processor.tokenizer.padding_side = "left"
        self._max_tokens, self._keep_rate, self._one_by_one = max_tokens, keep_rate, one_by_one

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
                        replies = self._from_frames(clip, some, arm)
                    elif arm == CACHED:
                        replies = self._from_cache(clip, some)
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
        started: float | None = None,
    ) -> list[Reply]:
        """Answer all questions in one way: with an adapter, with a video's frames in context, or with neither.

        Args:
            drop: one of `DROPPING_ARMS`: which of the video's tokens are left out.
            started: when the question was asked, by `time.perf_counter`; now when None.

        Raises:
            VideoError: `video_too_long`: the frames do not fit into the model's context.
        """
        found: list[Reply] = []
        at_once = 1 if self._one_by_one or drop == V2DROP else _AT_ONCE  # other questions' tokens are dropped elsewhere
        for first in range(0, len(asks), at_once):
            found += self._together(asks[first : first + at_once], adapter, video, drop, started)
        return found

    def _from_frames(self, clip: Clip, asks: Sequence[Ask], drop: str) -> list[Reply]:
        if not self._one_by_one:
            return self.replies(asks, video=self._sample(clip, drop), drop=drop)
        found: list[Reply] = []
        for ask in asks:
            started = time.perf_counter()
            found += self.replies([ask], video=self._sample(clip, drop), drop=drop, started=started)
        return found

    def _from_cache(self, clip: Clip, asks: Sequence[Ask]) -> list[Reply]:
        """Answer from the frames in context, up to whose end keys and values are there before each question."""
        video, prompts = self._sample(clip), []
        for ask in asks:
            inputs = self._inputs([ask], video).to(self._model.device)
            self._check_length(inputs["input_ids"].shape[1], video)
            prompts.append(inputs)
        (visual_V,) = (prompts[0]["input_ids"][0] == self._model.config.image_token_id).nonzero(as_tuple=True)
        until = int(visual_V[-1]) + 1
        pixels = prompts[0]["pixel_values"].to(self._model.dtype)
        whole = self._model(input_ids=prompts[0]["input_ids"][:, :until], pixel_values=pixels, use_cache=True)
        found: list[Reply] = []
        for inputs in prompts:
            kept = copy.deepcopy(whole.past_key_values)
            clock = _FirstToken(time.perf_counter())
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            found += self._generate({**text, "past_key_values": kept}, clock)
        return found

    def _sample(self, clip: Clip, drop: str = "") -> SampledVideo:
        sampling = Sampling(self.internalizer.sampling.max_frames)
        video = sample_video(clip.path, self._processor, self.internalizer.limits, sampling)
        if drop != EVS:  # which says what it keeps only when it has seen the frames
            self.internalizer.tokens(video)  # refuses what cannot fit before pixels are made of an hour's frames
        return video

    def _compose(self, clip: Clip, chunks: int) -> Adapter:
        """The adapter of a video cut into `chunks` chunks of equal length."""
        info = open_source(clip.path, self.internalizer.limits).info
        chunking = Chunking(seconds=info.frame_count / info.fps / chunks, max_chunks=chunks)
        return self.internalizer.internalize(clip.path, chunking=chunking)

    def _together(
        self,
        asks: Sequence[Ask],
        adapter: Adapter | None,
        video: SampledVideo | None,
        drop: str,
        started: float | None = None,
    ) -> list[Reply]:
        clock = _FirstToken(time.perf_counter() if started is None else started)
        inputs = self._inputs(asks, video).to(self._model.device)
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
            replies = self._generate(dict(inputs), clock)
        return [self._as_read(reply) for reply in replies] if drop == V2DROP else replies

    def _inputs(self, asks: Sequence[Ask], video: SampledVideo | None) -> BatchFeature:
        texts = [self._prompt(ask.question.text, with_video=video is not None) for ask in asks]
        if video is None:
            return self._processor.tokenizer(texts, return_tensors="pt", padding=True)
        return self._processor(
            text=texts,
            videos=[[video.frames]] * len(texts),
            video_metadata=[[video.metadata]] * len(texts),
            do_sample_frames=False,
            return_tensors="pt",
            padding=True,
        )

    def _generate(self, inputs: dict[str, Any], clock: _FirstToken) -> list[Reply]:
        """The answers to prompts that fit."""
        output = self._model.generate(
            **inputs, max_new_tokens=self._max_tokens, do_sample=False, stopping_criteria=[clock]
        )
        answers = self._processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        seconds = (time.perf_counter() - clock.started) / len(answers)
        visual = (inputs["input_ids"] == self._model.config.image_token_id).sum(1).tolist()
        prompt = inputs["attention_mask"].sum(1).tolist()
        ttft = clock.milliseconds if self._one_by_one else None
        return [
            Reply(text.strip(), tokens, seen, ttft, seconds)
            for text, tokens, seen in zip(answers, prompt, visual, strict=True)
        ]

    def _as_read(self, reply: Reply) -> Reply:
        """An answer by V2Drop, with as many tokens as a layer reads."""
        seen = reply.visual_tokens or 0
        read = round(mean_tokens(len(text_layers_of(self._model)), seen, self._keep_rate))
        return replace(reply, prompt_tokens=reply.prompt_tokens - seen + read, visual_tokens=read)

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
