"""A hypernetwork for any model is trained from manifests: the right loss, real files, and nothing lost to a kill."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from f2l_vllm import models
from f2l_vllm.cli.main import app
from f2l_vllm.hypernetwork.adapter import apply_factors
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.train.conversations import Conversations
from f2l_vllm.train.data.manifest import Example, write_manifest
from f2l_vllm.train.lessons import Lessons, cut
from f2l_vllm.train.loop import Loop
from f2l_vllm.train.optimizer import MuonAdamW
from f2l_vllm.train.options import TrainingOptions
from f2l_vllm.train.trainer import Trainer
from f2l_vllm.video.sample import Sampling, sample_video
from tests.support.training import filmed_examples, new_hypernetwork, train_words

TINY = models.resolve("f2l-tiny")
QUESTIONS = [("What happens?", "A red circle moves.", "caption"), ("How many shapes are there?", "Two.", "count")]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    return filmed_examples(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def trainer(processor) -> Trainer:
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    return Trainer(model, processor, new_hypernetwork(model), Loop())


def test_prefix_and_turns_are_the_prompts_the_template_writes(processor):
    prefix, (turns,) = Conversations(processor).turns([QUESTIONS])
    for (question, answer, _), turn in zip(QUESTIONS, turns, strict=True):
        user = {"role": "user", "content": [{"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=True)[0]
        assert [*prefix, *turn.ids[: turn.answer_start]] == prompt
        assert processor.decode(turn.ids[turn.answer_start :]) == f" {answer}<end_of_utterance>"


def test_turns_about_a_video_follow_its_frames(processor, examples):
    sampled = sample_video(examples[0].video_path, processor)
    prefix, turns = Conversations(processor).turns_about(sampled, QUESTIONS)
    for (question, _, _), turn in zip(QUESTIONS, turns, strict=True):
        content = [{"type": "video", "video": sampled.frames}, {"type": "text", "text": question}]
        whole = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_sample_frames": False, "video_metadata": [[sampled.metadata]]},
        )
        assert [*prefix, *turn.ids[: turn.answer_start]] == list(whole["input_ids"][0])


def test_a_template_that_does_not_lead_to_the_answer_is_refused(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{% for m in messages %}{{ m['role'] }}{% endfor %}Reply:")
    with pytest.raises(ValueError, match="generation prompt"):
        Conversations(processor)


def lessons_of(examples, processor, **options) -> Lessons:
    return Lessons(examples, processor, sampling=Sampling(), **options)


def test_an_epoch_shows_every_video_once_and_asks_its_own_questions(processor, examples):
    lessons = lessons_of(examples, processor, questions=3)
    assert len(lessons) == 4
    epochs = [lessons.take(4 * epoch, 4, random.Random(0), random.Random(0)) for epoch in range(2)]
    for taken in epochs:
        assert len({lesson.whole.frames.tobytes() for lesson in taken}) == 4
        assert all(len(lesson.asked) == 3 for lesson in taken)
    for lesson in epochs[0]:
        mine = [
            e
            for e in examples
            if sample_video(e.video_path, processor).frames.tobytes() == lesson.whole.frames.tobytes()
        ]
        assert set(lesson.asked) <= {(e.prompt, e.target_text, e.task_type) for e in mine}
    first_of = [[lesson.whole.frames.tobytes() for lesson in taken] for taken in epochs]
    assert first_of[0] != first_of[1], "another order in every epoch"


def test_pieces_hold_all_frames_once_and_keep_their_times(processor, examples):
    whole = sample_video(examples[0].video_path, processor)
    pieces = cut(whole, 3)
    assert [second for piece in pieces for second in piece.timestamps] == whole.timestamps
    assert sum(len(piece.frames) for piece in pieces) == len(whole.frames)
    assert max(len(piece.frames) for piece in pieces) - min(len(piece.frames) for piece in pieces) <= 1


def test_a_video_that_cannot_be_used_is_left_out_with_its_reason(processor, examples, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    lessons = lessons_of([Example("x", broken, "What?", "No.", "caption", "world", "train"), *examples], processor)
    taken = lessons.take(0, 5, random.Random(0), random.Random(0))
    assert len(taken) == 5
    ((key, reason),) = lessons.unusable.items()
    assert "broken.mp4" in key
    assert "not_a_video" in reason
    with pytest.raises(ValueError, match="None of the 1 videos"):
        lessons_of([Example("x", broken, "What?", "No.", "caption", "world", "train")], processor).take(
            0, 1, random.Random(0), random.Random(0)
        )


def test_examples_without_answers_are_refused(processor, examples):
    silent = Example("y", examples[0].video_path, "What?", "", "caption", "world", "train")
    with pytest.raises(ValueError, match="f2l-vllm targets"):
        lessons_of([silent], processor)


@pytest.mark.parametrize(
    "wrong",
    [
        {"videos": 0},
        {"kl": -1.0},
        {"ce": 0.0},
        {"temperature": 0.0},
        {"weigh": "videos"},
        {"chunks": ()},
        {"precision": "int8"},
        {"steps": 0},
        {"validate_every": 0},
    ],
)
def test_options_that_cannot_be_used_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingOptions(**wrong)


def answer_logits(trainer: Trainer, lesson, factors, row: int, question: int, *, with_video: bool) -> tuple:
    """Logits where one answer's tokens are predicted, and the tokens, from a prompt of its own, nothing packed."""
    if with_video:
        prefix, turns = trainer.conversations.turns_about(lesson.whole, lesson.asked)
    else:
        prefix, (turns,) = trainer.conversations.turns([lesson.asked])
    turn = turns[question]
    ids = torch.tensor([[*prefix, *turn.ids]])
    inputs = {"input_ids": ids}
    if with_video:
        inputs["pixel_values"] = trainer.encoder.prepare(lesson.whole)["pixel_values"]
    mine = {name: (a[row], b[row]) for name, (a, b) in factors.items()}
    with apply_factors(trainer.model, mine, trainer.hyper.scale):
        logits = trainer.model(**inputs).logits[0]
    count = len(turn.ids) - turn.answer_start
    return logits[-count - 1 : -1], ids[0, -count:]


@torch.no_grad()
@pytest.mark.parametrize(
    ("chunks", "options"),
    [
        (1, TrainingOptions(kl=0.5)),
        (2, TrainingOptions(kl=0.5)),
        (1, TrainingOptions(ce=0.0, kl=1.0, temperature=2.0)),
        (1, TrainingOptions(ce=2.0, kl=0.5, temperature=0.5, weigh="answers")),
    ],
)
def test_the_loss_is_the_cross_entropy_under_each_videos_own_adapter(trainer, examples, chunks, options):
    for scaler in trainer.hyper.scaler_B.parameters():
        scaler.fill_(0.01)
    lessons = lessons_of(examples, trainer.processor, questions=3, chunks=(chunks,), frames=(4,)).take(
        0, 2, random.Random(1), random.Random(1)
    )
    assert [len(lesson.chunks) for lesson in lessons] == [chunks, chunks]
    loss = trainer.loss(lessons, options)
    pieces = [trainer.hyper(*trainer.features([lesson.chunks[index] for lesson in lessons])) for index in range(chunks)]
    factors = trainer.hyper.combine(pieces)
    none = {name: (a * 0, b) for name, (a, b) in factors.items()}
    student, teacher, truth = [], [], []
    for row, lesson in enumerate(lessons):
        for question in range(len(lesson.asked)):
            logits, ids = answer_logits(trainer, lesson, factors, row, question, with_video=False)
            student.append(logits)
            truth.append(ids)
            teacher.append(answer_logits(trainer, lesson, none, row, question, with_video=True)[0])
    kinds = [
        torch.nn.functional.cross_entropy(one, ids, reduction="none") for one, ids in zip(student, truth, strict=True)
    ]
    softened = [
        [(logits / options.temperature).softmax(-1) for logits in pair] for pair in zip(teacher, student, strict=True)
    ]
    squared = options.temperature**2
    apart = [squared * (p * (p.log() - q.log())).sum(-1) for p, q in softened]
    if options.weigh == "answers":
        answers, divergence = (torch.stack([one.mean() for one in some]).mean() for some in (kinds, apart))
    else:
        answers, divergence = torch.cat(kinds).mean(), torch.cat(apart).mean()
    assert loss.figures["answers"] == pytest.approx(answers.item(), abs=1e-4)
    assert loss.figures["kl"] == pytest.approx(divergence.item(), abs=1e-4)
    assert loss.weight == (len(truth) if options.weigh == "answers" else len(torch.cat(truth)))
    expected = options.ce * answers.item() + options.kl * divergence.item()
    assert loss.mean.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_few_steps_reduce_the_loss_on_videos_and_leave_the_model_alone(trainer, examples, precision):
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    options = TrainingOptions(
        steps=12, videos=4, questions=4, learning_rate=3e-3, muon_rate=0.02, precision=precision, chunks=(1, 2)
    )
    result = trainer.train(examples, options, validation=examples)
    assert result["validation_loss"]["after"] < 0.9 * result["validation_loss"]["before"]
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert next(trainer.hyper.parameters()).dtype == torch.float32


def test_accumulated_parts_give_the_gradient_of_the_whole_step(processor, examples, monkeypatch):
    gradients: list[list[torch.Tensor]] = []

    def keep(optimizer: MuonAdamW, factor: float) -> float:
        gradients.append([parameter.grad.clone() for parameter in optimizer.parameters])
        return 0.0

    monkeypatch.setattr(MuonAdamW, "step", keep)
    # All questions but one are about the first video: the parts of a step are of very different lengths.
    uneven = [example for example in examples if example.id.startswith("0-")]
    uneven += [example for example in examples if example.id in ("1-0", "2-0", "3-0")]
    for accumulate in (1, 2, 4):
        model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
        trainer = Trainer(model, processor, new_hypernetwork(model), Loop())
        trainer.train(uneven, TrainingOptions(steps=1, videos=4, accumulate=accumulate, questions=20))
    for whole, *split in zip(*gradients, strict=True):
        for parts in split:
            torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-3)


def test_what_is_computed_again_has_the_same_gradients_and_is_not_kept(trainer, examples):
    for scaler in trainer.hyper.scaler_B.parameters():
        torch.nn.init.constant_(scaler, 0.01)
    asked = {"questions": 1, "chunks": (2,), "frames": (8,)}
    some = lessons_of(examples, trainer.processor, **asked).take(0, 2, random.Random(1), random.Random(1))
    gradients, kept = [], []
    for recompute in (False, True):
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, torch.UntypedStorage] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        trainer.hyper.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trainer.loss(some, TrainingOptions(recompute=recompute))
        kept.append(sum(storage.nbytes() for storage in saved.values()))
        loss.mean.backward()
        gradients.append([parameter.grad.clone() for parameter in trainer.hyper.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize(("videos", "accumulate", "choice"), [(3, 2, 4), (1, 4, 4), (10, 4, 12)])
def test_a_step_that_cannot_be_shared_evenly_is_refused(trainer, examples, videos, accumulate, choice):
    with pytest.raises(ValueError, match=rf"{videos} videos a step cannot be shared evenly.*e\.g\. {choice}\."):
        trainer.train(examples, TrainingOptions(steps=1, videos=videos, accumulate=accumulate))


def test_the_frames_it_is_trained_on_become_its_own(trainer, examples):
    trainer.hyper.config = replace(trainer.hyper.config, max_frames=12)
    trainer.train(examples, TrainingOptions(steps=1, videos=1))
    assert trainer.hyper.config.max_frames == 12
    trainer.train(examples, TrainingOptions(steps=1, videos=1, frames=(4, 8, 6)))
    assert trainer.hyper.config.max_frames == 8


@pytest.mark.parametrize(("modules", "wrong"), [("down_projj", "down_projj"), ("q_proj,,up_proj", "")])
def test_a_module_that_there_is_not_is_refused_with_those_there_are(examples, tmp_path, modules, wrong):
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(manifest, examples)
    options = ["train", str(tmp_path / "run"), "--manifest", str(manifest), "--modules", modules]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    shown = " ".join(result.output.replace("│", " ").split())
    assert f"Unknown target module {wrong!r}; choose from ['q_proj'," in shown


def test_blanks_between_modules_do_not_matter(examples, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(manifest, examples)
    words = train_words(tmp_path / "run", manifest, steps="--steps 1 --videos 1")
    result = CliRunner().invoke(app, [*words, "--modules", "up_proj, down_proj"])
    assert result.exit_code == 0, result.output
    assert list(Hypernetwork.load(tmp_path / "run" / "hypernetwork").config.modules) == ["down_proj", "up_proj"]


@pytest.fixture(scope="module")
def kept_run(examples, processor, tmp_path_factory) -> Path:
    """The folder of a run of one step, its checkpoint in it."""
    folder = tmp_path_factory.mktemp("run")
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    trainer = Trainer(model, processor, new_hypernetwork(model), Loop(folder))
    trainer.train(examples, TrainingOptions(steps=1, videos=2, questions=1))
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 3),
        ("videos", 4),
        ("accumulate", 2),
        ("questions", 2),
        ("learning_rate", 1e-3),
        ("muon_rate", 0.01),
        ("weight_decay", 0.0),
        ("clip", 2.0),
        ("kl", 0.5),
        ("ce", 0.5),
        ("temperature", 2.0),
        ("weigh", "answers"),
        ("frames", (4,)),
        ("chunks", (1, 2)),
        ("precision", "bf16"),
        ("recompute", True),
    ],
)
def test_a_run_goes_on_with_the_options_it_was_started_with_alone(examples, trainer, kept_run, name, value):
    trainer.loop = Loop(kept_run)
    options = TrainingOptions(**{"steps": 1, "videos": 2, "questions": 1, name: value})
    with pytest.raises(ValueError, match=rf"another run \(other {name}\)"):
        trainer.train(examples, options)


def test_a_run_goes_on_with_the_same_examples_and_sampling_alone(examples, trainer, kept_run):
    options = TrainingOptions(steps=1, videos=2, questions=1)
    trainer.loop = Loop(kept_run)
    for others in (examples[:-1], [replace(examples[0], target_text="No."), *examples[1:]]):
        with pytest.raises(ValueError, match=r"\(other examples\)"):
            trainer.train(others, options)
    as_trained = trainer.hyper.config
    trainer.hyper.config = replace(as_trained, longest_edge=64)
    with pytest.raises(ValueError, match=r"\(other longest_edge\)"):
        trainer.train(examples, options)
    trainer.hyper.config = as_trained
    assert trainer.train(examples, options)["steps"] == 1


def test_a_run_goes_on_when_the_folder_of_its_videos_has_moved(examples, trainer, kept_run, tmp_path):
    options = TrainingOptions(steps=1, videos=2, questions=1)
    trainer.loop = Loop(kept_run)
    shutil.copytree(examples[0].video_path.parent, tmp_path / "moved")
    moved = [replace(example, video_path=tmp_path / "moved" / example.video_path.name) for example in examples]
    names = {"0.mp4": "1.mp4", "1.mp4": "0.mp4"}
    paths = {example.video_path.name: example.video_path for example in moved}
    swapped = [
        replace(example, video_path=paths[names.get(example.video_path.name, example.video_path.name)])
        for example in moved
    ]
    with pytest.raises(ValueError, match=r"\(other examples\)"):
        trainer.train(swapped, options)
    assert trainer.train(moved, options)["steps"] == 1
