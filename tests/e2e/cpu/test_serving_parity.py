"""vLLM on the CPU platform answers what transformers and peft answer, token for token."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from vllm import envs
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase

from f2l_vllm.cpu import linear
from f2l_vllm.cpu.lora_slots import is_table
from f2l_vllm.doctor.reference import Generated, Reference
from f2l_vllm.engine.base_models import smolvlm as smolvlm_video

TOLERANCE = 1e-3  # of a log-probability, fp32
MAX_TOKENS = 12
CHUNK = 48  # tokens per step: most prompts below are read in several chunks
QUESTIONS = ["Who scores?", "What is shown in the video, and which colour is the square that moves to the left?"]


@pytest.fixture(scope="module")
def adapters(make_lora: Callable[..., Path]) -> dict[str, Path]:
    """Of unequal ranks, and more than the engine has slots."""
    ranks = {"first": 8, "second": 16, "third": 5, "fourth": 12}
    return {name: make_lora(rank=rank, seed=seed) for seed, (name, rank) in enumerate(ranks.items(), 1)}


@pytest.fixture(scope="module")
def reference(smolvlm_dir: Path, adapters: dict[str, Path]) -> Reference:
    return Reference(smolvlm_dir, adapters)


@pytest.fixture(scope="module")
def engine(smolvlm_dir: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(smolvlm_dir, adapters)
    yield engine
    engine.close()


class Engine:
    """One vLLM engine in this process."""

    def __init__(self, checkpoint: Path, adapters: dict[str, Path]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            patch.setenv("F2L_CPU_KV_BYTES", str(32 << 20))
            patch.setattr(linear, "MIN_ELEMENTS", 0)  # this model's layers are small
            from vllm import LLM
            from vllm.lora.request import LoRARequest

            self.llm = LLM(
                str(checkpoint),
                dtype="float32",
                max_model_len=1024,
                max_num_seqs=8,
                max_num_batched_tokens=CHUNK,
                enable_prefix_caching=True,
                enable_lora=True,
                max_loras=3,
                max_cpu_loras=4,
                max_lora_rank=16,
                lora_target_modules=["down_proj"],
                limit_mm_per_prompt={"image": 2, "video": 2},
            )
        self.adapters = {
            name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)
        }
        for request in self.adapters.values():
            assert self.llm.llm_engine.add_lora(request)

    def chat(self, contents: list[list[dict[str, Any]]], names: list[str | None] | None = None) -> list[Any]:
        from vllm import SamplingParams

        return self.llm.chat(
            [[{"role": "user", "content": content}] for content in contents],
            SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0),
            lora_request=[self.adapters[name] if name else None for name in names or [None] * len(contents)],
            use_tqdm=False,
        )

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def text(question: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": question}]


def worst_difference(output: Any, expected: Generated) -> float:
    completion = output.outputs[0]
    assert list(completion.token_ids) == expected.tokens
    given = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    return max(abs(a - b) for a, b in zip(given, expected.logprobs, strict=True))


def test_an_engine_leaves_no_variable_that_a_server_started_from_here_would_warn_of(engine: Engine) -> None:
    assert [name for name in os.environ if name.startswith("VLLM_") and name not in envs.environment_variables] == []


@pytest.mark.parametrize("question", QUESTIONS)
def test_base_model_answers_as_transformers(engine: Engine, reference: Reference, question: str) -> None:
    expected = reference.answer(reference.chat(text(question)), MAX_TOKENS)
    assert worst_difference(engine.chat([text(question)])[0], expected) < TOLERANCE


def test_one_adapter_answers_as_peft(engine: Engine, reference: Reference) -> None:
    inputs = reference.chat(text(QUESTIONS[0]))
    expected = reference.answer(inputs, MAX_TOKENS, "first")
    assert expected.tokens != reference.answer(inputs, MAX_TOKENS).tokens
    assert worst_difference(engine.chat([text(QUESTIONS[0])], ["first"])[0], expected) < TOLERANCE


def test_two_adapters_and_the_base_model_share_a_batch(engine: Engine, reference: Reference) -> None:
    names = ["first", None, "second", "first"]
    questions = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]]
    outputs = engine.chat([text(question) for question in questions], names)
    for question, name, output in zip(questions, names, outputs, strict=True):
        expected = reference.answer(reference.chat(text(question)), MAX_TOKENS, name)
        assert worst_difference(output, expected) < TOLERANCE


def test_many_decode_together_at_unequal_lengths_and_take_turns_in_the_slots(
    engine: Engine, reference: Reference
) -> None:
    names = ["fourth", "third", None, "first", "third", "second", "first", None, "fourth", "second"]
    questions = [" ".join(QUESTIONS[:1] * (1 + 5 * (row % 4)) + QUESTIONS[1:]) for row in range(len(names))]
    outputs = engine.chat([text(question) for question in questions], names)
    for question, name, output in zip(questions, names, outputs, strict=True):
        expected = reference.answer(reference.chat(text(question)), MAX_TOKENS, name)
        assert worst_difference(output, expected) < TOLERANCE


def test_these_answers_come_from_packed_layers_and_slots(engine: Engine) -> None:
    def look(model: Any) -> tuple[set[int], set[bool]]:
        linears = [layer for layer in model.modules() if isinstance(layer, LinearBase)]
        slots = [layer.lora_a_stacked[0] for layer in model.modules() if isinstance(layer, BaseLinearLayerWithLoRA)]
        return {layer.weight.numel() for layer in linears}, {is_table(a_M1RI) for a_M1RI in slots}

    assert engine.llm.apply_model(look) == [({0}, {True})]


def test_prompt_longer_than_a_step_is_read_in_chunks(engine: Engine, reference: Reference) -> None:
    question = " ".join(QUESTIONS * 4)
    inputs = reference.chat(text(question))
    assert inputs["input_ids"].shape[1] > 3 * CHUNK
    expected = reference.answer(inputs, MAX_TOKENS, "second")
    assert worst_difference(engine.chat([text(question)], ["second"])[0], expected) < TOLERANCE


def test_prefix_cache_hit_gives_the_same_answer(engine: Engine, reference: Reference) -> None:
    shared = "The quick brown fox jumps over the lazy dog. " * 4
    engine.chat([text(shared + "Who?")], ["first"])
    output = engine.chat([text(shared + "Which colour?")], ["first"])[0]
    assert output.num_cached_tokens >= 32
    expected = reference.answer(reference.chat(text(shared + "Which colour?")), MAX_TOKENS, "first")
    assert worst_difference(output, expected) < TOLERANCE


def test_other_adapter_does_not_hit_the_prefix_cache(engine: Engine) -> None:
    question = text("Describe the image in detail. " * 4)
    engine.chat([question], ["first"])
    assert engine.chat([question], ["second"])[0].num_cached_tokens == 0


def test_image_is_split_and_seen_as_in_transformers(engine: Engine, reference: Reference) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    inputs = reference.chat([{"type": "image", "image": image}, *text(QUESTIONS[0])])
    assert inputs["pixel_values"].shape[1] == 5  # four tiles and the whole
    output = engine.chat([[{"type": "image_pil", "image_pil": image}, *text(QUESTIONS[0])]])[0]
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert worst_difference(output, reference.answer(inputs, MAX_TOKENS)) < TOLERANCE


@pytest.mark.parametrize("frames", [24, 100])
@pytest.mark.parametrize("adapter", [None, "second"])
def test_video_url_is_seen_as_in_transformers(
    engine: Engine, reference: Reference, tmp_path: Path, frames: int, adapter: str | None
) -> None:
    path = write_mp4(tmp_path / "clip.mp4", frames, seed=frames)
    inputs = reference.chat([{"type": "video", "path": str(path)}, *text(QUESTIONS[0])])
    output = engine.chat([[video_part(path), *text(QUESTIONS[0])]], [adapter])[0]
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert worst_difference(output, reference.answer(inputs, MAX_TOKENS, adapter)) < TOLERANCE


def test_two_videos_and_text_between_them(
    engine: Engine, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smolvlm_video, "_FRAMES_PER_CALL", 3)  # a batch of frames across the two videos
    paths = [write_mp4(tmp_path / f"{seed}.mp4", 24, seed=seed) for seed in range(2)]
    question = text("and then"), text("Which is red?")
    inputs = reference.chat(
        [
            {"type": "video", "path": str(paths[0])},
            *question[0],
            {"type": "video", "path": str(paths[1])},
            *question[1],
        ]
    )
    output = engine.chat([[video_part(paths[0]), *question[0], video_part(paths[1]), *question[1]]])[0]
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert worst_difference(output, reference.answer(inputs, MAX_TOKENS)) < TOLERANCE


def test_seeded_request_gives_the_same_tokens_alone_and_among_partial_prefills(engine: Engine) -> None:
    from vllm import SamplingParams

    seeded = SamplingParams(temperature=1, seed=7, max_tokens=MAX_TOKENS, ignore_eos=True)
    prompts = ["fox " * 100, "Who scores?", "dog " * 150]
    alone = [engine.llm.generate([prompt], seeded, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    engine.llm.reset_prefix_cache()
    together = [output.outputs[0].token_ids for output in engine.llm.generate(prompts, seeded, use_tqdm=False)]
    assert together == alone


def video_part(path: Path) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}


def write_mp4(path: Path, frames: int, seed: int) -> Path:
    height, width = 40, 56
    picture = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            moved = np.ascontiguousarray(np.roll(picture, 3 * index, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())
    return path
