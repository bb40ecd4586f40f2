"""Merged visual tokens through a real server: half of them, in answers from frames and in internalization."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI
from openai.types import FileObject
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from f2l_vllm.base_models.merging import tokens_of_frames
from f2l_vllm.doctor.reference import Reference
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.settings import Settings
from f2l_vllm.store.address import Revisions, fingerprint
from f2l_vllm.video.reading import ReadingOptions
from tests.e2e.server.conftest import RATE
from tests.support.server import Server
from tests.support.videos import write_video
from tests.unit.hypernetwork.test_merging import merged_by_hand

FRAMES, PER_FRAME = 6, 4  # sampled of the video; of the random model
KEPT = FRAMES * PER_FRAME // 2
QUESTION = "What is shown in the video?"
MAX_TOKENS = 12
TOLERANCE = 1e-3  # of a log-probability, fp32


@pytest.fixture(scope="module")
def merging(other_server: Server) -> Server:
    return other_server


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "bars.mp4", frames=10 * FRAMES, fps=10)


@pytest.fixture(scope="module")
def video(merging: Server, path: Path) -> FileObject:
    return merging.upload(path)


def asking(model: str, mode: str | None = None) -> dict[str, Any]:
    """The arguments of one question."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "logprobs": True,
        "extra_body": {"ignore_eos": True, "return_token_ids": True, **({"f2l": {"mode": mode}} if mode else {})},
    }


def logprobs(response: Any) -> list[float]:
    return [token.logprob for token in response.choices[0].logprobs.content]


@torch.no_grad()
def merged_inputs(model: Any, reference: Reference, path: Path) -> tuple[list[int], torch.Tensor]:
    """Ids and embeddings of the question with the frames in front, as transformers makes them, merged by hand."""
    inputs = reference.chat([{"type": "video", "path": str(path)}, {"type": "text", "text": QUESTION}])
    visual = model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"]).pooler_output
    counts = tokens_of_frames(FRAMES, PER_FRAME, RATE)
    image = reference.processor.image_token_id
    kept = [place < count for count in counts for place in range(PER_FRAME)]
    ids = [token for token in inputs["input_ids"][0].tolist() if token != image or kept.pop(0)]
    embeds = model.get_input_embeddings()(torch.tensor(ids))
    embeds[torch.tensor(ids) == image] = merged_by_hand(visual, counts).to(embeds.dtype)
    return ids, embeds[None]


def test_frames_in_context_are_answered_as_transformers_answers_from_merged_tokens(
    merging: Server, video: FileObject, path: Path, hypernetwork_model: Path
) -> None:
    reference = Reference(hypernetwork_model, {})
    model = AutoModelForImageTextToText.from_pretrained(hypernetwork_model, dtype=torch.float32)
    ids, embeds = merged_inputs(model, reference, path)
    expected = reference.answer({"inputs_embeds": embeds}, MAX_TOKENS)
    response = merging.client.chat.completions.create(**asking(video.id, "frames"))
    assert response.model_extra["prompt_token_ids"] == ids
    assert response.usage.prompt_tokens == len(ids)
    assert response.model_extra["f2l"]["visual_tokens"] == KEPT
    assert response.choices[0].model_extra["token_ids"] == expected.tokens
    assert max(abs(a - b) for a, b in zip(logprobs(response), expected.logprobs, strict=True)) < TOLERANCE


def test_questions_from_frames_adapter_and_neither_share_batches(merging: Server, video: FileObject) -> None:
    questions = [asking(video.id, "frames"), asking(video.id), asking("base"), asking(video.id, "both")]
    alone = [merging.client.chat.completions.create(**question) for question in questions]
    assert len({answer.choices[0].message.content for answer in alone}) == 4

    async def together() -> list[Any]:
        key = merging.client.api_key
        async with AsyncOpenAI(base_url=f"{merging.url}/v1", api_key=key, max_retries=0) as client:
            return await asyncio.gather(*(client.chat.completions.create(**question) for question in questions * 4))

    for have, want in zip(asyncio.run(together()), alone * 4, strict=True):
        assert have.choices[0].model_extra["token_ids"] == want.choices[0].model_extra["token_ids"]
        assert logprobs(have) == pytest.approx(logprobs(want), abs=TOLERANCE)


def test_answers_say_how_many_visual_tokens_they_carried(merging: Server, video: FileObject) -> None:
    counted = {}
    for mode in ("adapter", "frames", "both"):
        stream = merging.client.chat.completions.create(
            **asking(video.id, mode), stream=True, stream_options={"include_usage": True}
        )
        counted[mode] = next(chunk.model_extra["f2l"] for chunk in stream if chunk.usage and not chunk.choices)
    assert {mode: details["visual_tokens"] for mode, details in counted.items()} == {
        "adapter": 0,
        "frames": KEPT,
        "both": KEPT,
    }
    assert counted["adapter"]["visual_tokens_avoided"] == KEPT


def test_the_adapter_was_made_from_merged_tokens_under_a_name_of_its_own(
    merging: Server, video: FileObject, path: Path, hypernetwork_model: Path
) -> None:
    details = video.model_extra["f2l"]
    assert (details["visual_tokens"], details["merge_rate"]) == (KEPT, RATE)
    weights = hypernetwork_model / "hypernetwork"
    revisions = fingerprint(hypernetwork_model), fingerprint(weights)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    merged, whole = (Revisions(*revisions, Settings(merge_rate=rate).reading).name(sha256) for rate in (RATE, 0.0))
    assert details["adapter"] == merged != whole
    internalizer = Internalizer.load(
        hypernetwork_model, weights, dtype=torch.float32, reading=ReadingOptions(merge_rate=RATE)
    )
    published = load_file(merging.adapter_folder(merged) / WEIGHTS_FILE)
    torch.testing.assert_close(published, internalizer.internalize(path).tensors())
