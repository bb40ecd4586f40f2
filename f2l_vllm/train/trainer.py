"""Trains a hypernetwork for any base model from manifests of videos, questions and answers.

The student is the frozen model with the adapter; it sees the question and no visual token. Its loss is the
cross-entropy of the answer's tokens plus, if wanted, the divergence from the teacher: the same model with the frames in
its context. Only the hypernetwork learns, in fp32.

Shape suffixes: B videos, L text layers, T tokens of the internalization message, D hidden size, N answer tokens.

Source: Frames2LoRA (arXiv 2606.04351), section 3 and the training appendix.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from f2l_vllm.base_models.text_layers import name_of, text_model_of
from f2l_vllm.hypernetwork.adapter import Factors, apply_factors
from f2l_vllm.hypernetwork.encoder import VideoEncoder, pad_mask
from f2l_vllm.hypernetwork.fit import check_fit
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.train import folder
from f2l_vllm.train.conversations import Conversations
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.train.estimate import Memory, Part, estimate
from f2l_vllm.train.folder import REPORT_FILE
from f2l_vllm.train.lessons import Lesson, Lessons
from f2l_vllm.train.loader import Loader
from f2l_vllm.train.loop import Loop, Loss, Stage
from f2l_vllm.train.optimizer import MuonAdamW, warm_cosine
from f2l_vllm.train.options import PRECISIONS, TrainingOptions
from f2l_vllm.train.packing import IGNORED, PackedBatch, pack
from f2l_vllm.train.steps import Randomness
from f2l_vllm.train.validation import Validation
from f2l_vllm.video.sample import SampledVideo, Sampling

STAGE = "hypernetwork"
_log = logging.getLogger(__name__)
_VALIDATED = 64  # videos


class Trainer:
    """A frozen model, its processor, and the hypernetwork that learns.

    Args:
        model: a transformers model of a known family; moved to the loop's device.
        processor: the model's.
        hyper: hypernetwork for this model; trained in place, in fp32.
        loop: takes the steps.

    Raises:
        ValueError: the hypernetwork does not fit the model.
    """

    def __init__(self, model: nn.Module, processor: Any, hyper: Hypernetwork, loop: Loop) -> None:
        check_fit(model, hyper.config)
        self.model: Any = model.to(loop.device).eval().requires_grad_(False)
        self.hyper = hyper.to(loop.device).float()
        self.processor, self.loop = processor, loop
        self.encoder = VideoEncoder(model, processor)
        self.conversations = Conversations(processor)
        self.best: dict[str, Tensor] | None = None
        self._pad: int = processor.tokenizer.pad_token_id

    def train(
        self,
        examples: Sequence[Example],
        options: TrainingOptions,
        validation: Sequence[Example] = (),
        earlier: Sequence[dict[str, Any]] = (),
        loader_workers: int = 0,
    ) -> dict[str, Any]:
        """Train to the end, going on where a killed run in the same folder stopped.

        Args:
            earlier: reports of the runs that this run extends. Its videos go on where theirs ended; its steps warm up
                and decay like those of any run, with a fresh optimizer.
            loader_workers: processes that decode videos ahead; it changes no step.

        Returns:
            the result of `Loop.run`, the videos left out with their reasons, and the loss on the validation examples
            before and after; with `validate_every` also after every so many steps, and where it was best. The
            hypernetwork has the last weights then, `self.best` the best.

        Raises:
            ValueError: examples that cannot be trained on, or a step whose videos cannot be shared evenly.
        """
        parts = self.loop.processes * options.accumulate
        share, left_over = divmod(options.videos, parts)
        if left_over:
            raise ValueError(
                f"{options.videos} videos a step cannot be shared evenly by {self.loop.processes} processes that "
                f"accumulate {options.accumulate} parts each; choose a multiple of {parts}, e.g. {parts * (share + 1)}."
            )
        config = self.hyper.config
        sampling = Sampling(config.max_frames, longest_edge=config.longest_edge)
        lessons_of = partial(
            Lessons,
            processor=self.processor,
            sampling=sampling,
            frames=options.frames,
            chunks=options.chunks,
            questions=options.questions,
        )
        lessons = lessons_of(examples, seed=self.loop.seed)
        held_out = lessons_of(validation, seed=0) if validation else None
        if options.validate_every and held_out is None:
            raise ValueError("validate_every needs validation examples: name their manifest with --validation.")
        steps = options.steps_of(len(lessons))
        named = self.hyper.named_parameters()
        optimizer = MuonAdamW(
            named,
            muon_lr=options.muon_rate,
            adamw_lr=options.learning_rate,
            weight_decay=options.weight_decay,
            clip=options.clip,
        )
        shown = sum(report["steps"] * report["options"]["videos"] for report in earlier)
        name = f"{STAGE}-{len(earlier) + 1}" if earlier else STAGE
        part = 0

        def draw(number: int) -> list[Lesson]:
            step, of_step = divmod(number, options.accumulate)
            first = shown + step * options.videos + (of_step * self.loop.processes + self.loop.process) * share
            randomness = Randomness.of_part(name, step, of_step, options.accumulate, self.loop.seed, self.loop.process)
            return lessons.take(first, share, randomness.shared, randomness.rng)

        loader = Loader(lessons, draw, steps * options.accumulate, loader_workers)

        def step_loss(_: Randomness, step: int) -> Loss:
            nonlocal part
            loss = self.loss(loader.take(step * options.accumulate + part), options)
            part = (part + 1) % options.accumulate
            return replace(loss, figures={**loss.figures, "waited_s": round(loader.waited, 1)})

        course: Validation | None = None
        if held_out is not None:
            # As the released files are chosen: by the cross-entropy, where that is trained.
            measured = replace(options, kl=0.0, ce=1.0) if options.ce else options
            measure = partial(self.validate, held_out, measured)
            keeps_best = options.validate_every is not None and self.loop.is_main
            course = Validation(measure, options.validate_every or steps, keep_best=keeps_best)
        stage = Stage(
            name,
            self.hyper,
            optimizer,
            step_loss,
            steps,
            warm_cosine,
            options.accumulate,
            self._identity(lessons, held_out, options, sampling),
            course,
        )
        try:
            result: dict[str, Any] = self.loop.run(stage, lessons.unusable)
        finally:
            loader.close()
        if options.frames:  # wherever it is used, it reads as many frames as it has learned to read
            self.hyper.config = replace(config, max_frames=max(options.frames))
        result |= {"videos": len(lessons), "left_out": lessons.unusable}
        if course is not None:
            losses = [{"step": step, "loss": round(loss, 4)} for step, loss in course.losses.items()]
            result["validation_loss"] = {"before": losses[0]["loss"], "after": losses[-1]["loss"]}
            if options.validate_every:
                self.best = course.best
                result |= {"validations": losses, "best_step": course.best_step}
        return result

    def _identity(
        self, lessons: Lessons, held_out: Lessons | None, options: TrainingOptions, sampling: Sampling
    ) -> dict[str, Any]:
        """What the steps depend on besides what the loop knows; epochs are given as the steps they make."""
        known = {"epochs", "steps", "accumulate"}
        return {
            **{name: value for name, value in asdict(options).items() if name not in known},
            **asdict(sampling),
            "examples": lessons.digest(),
            "validation": None if held_out is None else held_out.digest(),
            "model": name_of(self.model),
        }

    def loss(self, lessons: Sequence[Lesson], options: TrainingOptions) -> Loss:
        """The loss of B videos, each with its own adapter: the mean over their answers' N tokens, with weight N, or the
        mean over the answers of their own means, with their number as its weight."""
        dtype = PRECISIONS[options.precision]
        device = self.loop.device
        context: Any = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        with context:
            chunks, tokens = [], 0
            for videos in zip(*(lesson.chunks for lesson in lessons), strict=True):
                features_BLTD, mask_BT = self.features(videos)
                tokens += int(mask_BT.sum())
                chunks.append(self._factors(features_BLTD.to(self.hyper.head.weight.dtype), mask_BT, options))
            prefix, turns = self.conversations.turns([lesson.asked for lesson in lessons])
            tokens += sum(len(prefix) + sum(len(turn.ids) for turn in row) for row in turns)
            batch = pack([prefix] * len(lessons), turns, shared=len(prefix), pad_token_id=self._pad)
            with apply_factors(self.model, self.hyper.combine(chunks), self.hyper.scale):
                logits_NV = self._logits(batch, None)
            targets_N = batch.labels[batch.labels != IGNORED].to(device)
            weights_N = _weights(batch, options.weigh).to(device)
            answers = _mean(nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none"), weights_N)
            loss, figures = options.ce * answers, {"answers": answers.item()}
            if options.kl:
                teacher_NV = torch.cat([self._teach(lesson) for lesson in lessons])
                divergence = _mean(_divergence(logits_NV.float(), teacher_NV, options.temperature), weights_N)
                figures["kl"] = divergence.item()
                loss = options.kl * divergence + (loss if options.ce else 0.0)
        return Loss(loss, figures, round(weights_N.sum().item()), tokens)

    def _factors(self, features_BLTD: Tensor, mask_BT: Tensor, options: TrainingOptions) -> Factors:
        if not options.recompute or not torch.is_grad_enabled():
            return self.hyper(features_BLTD, mask_BT)
        mask_BT = mask_BT.bool()
        layers = [
            checkpoint(self.hyper.perceive, features_BTD, mask_BT, use_reentrant=False)
            for features_BTD in features_BLTD.unbind(1)
        ]
        return self.hyper.project(torch.stack(layers, dim=1))

    def memory(self, examples: Sequence[Example], options: TrainingOptions) -> Memory:
        """What a step needs in this process, by its first video, with the most frames and chunks of the options.

        Raises:
            ValueError: as `Lessons`.
        """
        config = self.hyper.config
        lessons = Lessons(
            examples,
            self.processor,
            sampling=Sampling(config.max_frames, longest_edge=config.longest_edge),
            frames=options.frames and (max(options.frames),),
            chunks=(max(options.chunks),),
            questions=options.questions,
        )
        chosen = Randomness.of("memory", 0)
        one = self.part(lessons.take(0, 1, chosen.shared, chosen.rng))
        videos = max(1, options.videos // (self.loop.processes * options.accumulate))
        return estimate(
            self.model,
            self.hyper,
            replace(one, videos=videos, answers=one.answers * videos),
            bf16=PRECISIONS[options.precision] is not None,
            muon=options.muon_rate is not None,
            teacher=options.kl > 0,
            recompute=options.recompute,
        )

    def part(self, lessons: Sequence[Lesson]) -> Part:
        """The sizes of what a process computes at once."""
        chunks = lessons[0].chunks
        tokens = max(len(self.encoder.tokens(chunk)) for chunk in chunks)
        prefix, turns = self.conversations.turns([lesson.asked for lesson in lessons])
        batch = pack([prefix] * len(lessons), turns, shared=len(prefix), pad_token_id=self._pad)
        answers = int((batch.labels != IGNORED).sum())
        return Part(len(lessons), len(chunks), tokens, batch.input_ids.shape[1], answers, len(lessons[0].whole.frames))

    @torch.no_grad()
    def features(self, videos: Sequence[SampledVideo]) -> tuple[Tensor, Tensor]:
        """The inputs of each text layer for videos read together: [B, L, T, D], and the mask of real tokens [B, T]."""
        ids = [self.encoder.tokens(sampled) for sampled in videos]
        collected: list[Tensor] = []
        visual = [self.encoder.see(sampled) for sampled in videos]
        self.encoder.read(ids, visual, lambda _, features_BTD: collected.append(features_BTD))
        return torch.stack(collected, dim=1), pad_mask([len(one) for one in ids]).to(self.loop.device)

    @torch.no_grad()
    def validate(self, lessons: Lessons, options: TrainingOptions) -> float:
        """Mean loss over up to `_VALIDATED` videos, always the same ones, shared by all processes. Each computes as
        many at once as in training."""
        count, processes = min(_VALIDATED, len(lessons)), self.loop.processes
        share = max(1, options.videos // (processes * options.accumulate))
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(self.loop.process * share, count, processes * share):
            randomness = Randomness.of(f"validation:{first}", 0)
            some = lessons.take(first, min(share, count - first), randomness.shared, randomness.rng)
            loss = self.loss(some, options)
            sums += torch.tensor([loss.mean.item() * loss.weight, loss.weight], dtype=torch.float64)
        total, weight = self.loop.sum(sums).tolist()
        return total / weight

    @torch.no_grad()
    def _teach(self, lesson: Lesson) -> Tensor:
        """The model's logits [N, V] where it predicts the answers with the frames in its context."""
        prefix, turns = self.conversations.turns_about(lesson.whole, lesson.asked)
        batch = pack([prefix], [turns], shared=len(prefix), pad_token_id=self._pad)
        return self._logits(batch, self.encoder.see(lesson.whole)).float()

    def _logits(self, batch: PackedBatch, visual_VD: Tensor | None) -> Tensor:
        """Logits [N, V] at the positions that predict the answers' tokens."""
        device = self.loop.device
        ids_BS = batch.input_ids.to(device)
        text_model: Any = text_model_of(self.model)
        embeds_BSD = text_model.get_input_embeddings()(ids_BS)
        if visual_VD is not None:
            embeds_BSD[ids_BS == self.model.config.image_token_id] = visual_VD.to(embeds_BSD.dtype)
        output = text_model(
            inputs_embeds=embeds_BSD,
            position_ids=batch.position_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
        )
        return self.model.lm_head(output.last_hidden_state[(batch.labels != IGNORED).to(device)])


def _weights(batch: PackedBatch, weigh: str) -> Tensor:
    """The weights [N] of the answers' tokens, in the order of the labels: 1, or 1 for all tokens of an answer."""
    lengths = torch.tensor([end - start for spans in batch.spans for start, end in spans])
    each = torch.ones_like(lengths, dtype=torch.float32) if weigh == "tokens" else 1 / lengths
    return each.repeat_interleave(lengths)


def _mean(losses_N: Tensor, weights_N: Tensor) -> Tensor:
    return (losses_N * weights_N).sum() / weights_N.sum()


def _divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) [N] of softened distributions, times the square of the temperature, which keeps the
    gradients' size (Hinton et al., arXiv 1503.02531)."""
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student_NV, teacher_NV))
    return nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * temperature**2


def train_to(
    output: Path,
    trainer: Trainer,
    examples: Sequence[Example],
    options: TrainingOptions,
    validation: Sequence[Example] = (),
    loader_workers: int = 0,
) -> dict[str, Any]:
    """Train and write the hypernetwork's directory: weights as trained, `training.json`, `log.jsonl`.

    With `validate_every`, `hypernetwork` has the best weights and `folder.LAST` the last, unless they are not finite.
    The trainer's loop keeps its checkpoint in the folder's `RUN_FOLDER`, which is removed when all is written.
    """
    earlier = folder.earlier(output)
    result = trainer.train(examples, options, validation, earlier, loader_workers)
    report = {"seed": trainer.loop.seed, "processes": trainer.loop.processes, "options": asdict(options), **result}
    if earlier:
        report["extends"] = earlier
    if trainer.loop.is_main:
        _save(trainer, output)
        (output / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        folder.end(output)
        _log.info("wrote %s", output / folder.BEST)
    trainer.loop.wait()
    return report


def _save(trainer: Trainer, output: Path) -> None:
    best, last = output / folder.BEST, output / folder.LAST
    if trainer.best is None:
        trainer.hyper.save(best, overwrite=True)
        shutil.rmtree(last, ignore_errors=True)  # of the run that this one replaces
        return
    try:
        trainer.hyper.save(last, overwrite=True)
    except ValueError as error:  # a run that diverged; its best weights are good
        shutil.rmtree(last, ignore_errors=True)
        _log.warning("%s is not written: %s", last, error)
    trainer.hyper.load_state_dict(trainer.best)
    trainer.hyper.save(best, overwrite=True)
