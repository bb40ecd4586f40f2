"""An engine's answers beside a reference's: what agrees, and every way in which they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from f2l_vllm.doctor import parity
from f2l_vllm.doctor.findings import Finding
from f2l_vllm.doctor.parity import Checked, Row, Variant
from f2l_vllm.doctor.reference import Followed

VIDEOS = {f"video {number}": Path(f"{number}.mp4") for number in (1, 2, 3)}
TOKENS = list(range(12))
V1 = Variant("V1", graphs=False)


class FakeReference:
    """Gives every token of an answer the same log-probability, another one for each question, adapter and video."""

    def __init__(self, rounding: float = 0.0, reach: float = 1.0) -> None:
        self.rounding, self.reach = rounding, reach

    def chat(self, content: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen = sum(10 for part in content if part["type"] == "video")
        return {"input_ids": torch.tensor([[seen, len(content[-1]["text"])]])}

    def follow(self, inputs: dict[str, torch.Tensor], tokens: list[int], adapter: str | None = None) -> Followed:
        value = -float(inputs["input_ids"].sum()) / 100 + self.rounding
        if adapter is not None:
            value -= self.reach * (1 + list(VIDEOS).index(adapter))
        return Followed([value] * len(tokens), [value] * len(tokens))


def checked(dtype: str = "float32") -> Checked:
    return Checked(Path("model"), VIDEOS, 16, ("down_proj",), VIDEOS, dtype)


def answers(reference: FakeReference, off: float = 0.0) -> dict[str, Any]:
    """What an engine would say that computes as this reference, `off` by so much."""

    def given(row: Row) -> dict[str, Any]:
        inputs = reference.chat(parity._for_reference(row, VIDEOS))
        logprobs = [value + off for value in reference.follow(inputs, TOKENS, row.adapter).logprobs]
        prompt = inputs["input_ids"][0].tolist()
        return {"prompt": prompt, "tokens": TOKENS, "logprobs": logprobs, "reason": "length"}

    some = [[given(row) for row in rows] for rows in checked().batches().values()]
    return {"runner": "V1", "graphs": "NONE", "dtype": "float32", "batches": some}


def references(exact: FakeReference, rounded: FakeReference | None = None) -> parity.References:
    both = parity.References.__new__(parity.References)
    both.exact, both.rounded = exact, rounded  # type: ignore[assignment]
    return both


def troubles(found: list[Finding]) -> list[str | None]:
    return [finding.trouble for finding in found]


def test_batches_have_base_rows_among_adapters_and_more_adapters_than_the_engine_has_slots() -> None:
    rows = checked().batches()["adapters and base rows"]
    assert [row.adapter for row in rows].count(None) >= 2
    assert len({row.adapter for row in rows} - {None}) > parity._SLOTS
    assert {row.video for row in checked().batches()["frames"]} == {*VIDEOS, None}


def test_an_engine_that_computes_the_same_agrees() -> None:
    reference = FakeReference()
    found = list(parity.compare(checked(), V1, answers(reference, off=5e-5), references(reference)))
    assert troubles(found) == [None] * 3
    assert [finding.difference for finding in found] == pytest.approx([5e-5] * 3)
    assert found[1].line.startswith("V1 runner, graphs NONE, float32: adapters and base rows: agrees with transformers")


def test_rounding_is_allowed_as_far_as_transformers_round_in_that_dtype() -> None:
    exact, rounded = FakeReference(), FakeReference(rounding=0.05)
    found = list(parity.compare(checked("bfloat16"), V1, answers(exact, off=0.12), references(exact, rounded)))
    assert troubles(found) == [None] * 3
    assert found[0].allowed == pytest.approx(0.16)
    found = list(parity.compare(checked("bfloat16"), V1, answers(exact, off=0.2), references(exact, rounded)))
    assert None not in troubles(found)


def test_a_row_with_another_rows_adapter_is_named() -> None:
    reference, given = FakeReference(), answers(FakeReference())
    mixed = given["batches"][1]
    mixed[0]["logprobs"], mixed[2]["logprobs"] = mixed[2]["logprobs"], mixed[0]["logprobs"]
    text, adapters, frames = parity.compare(checked(), V1, given, references(reference))
    assert (text.trouble, frames.trouble) == (None, None)
    assert adapters.trouble is not None
    assert "(adapter of video 1) has another model's answer" in adapters.trouble
    assert "DISAGREES" in adapters.line


def test_a_token_that_the_reference_would_not_choose_disagrees() -> None:
    class Other(FakeReference):
        def follow(self, *given: Any) -> Followed:
            found = super().follow(*given)
            return Followed(found.logprobs, [value + 0.1 for value in found.best])

    found = list(parity.compare(checked(), V1, answers(FakeReference()), references(Other())))
    assert None not in troubles(found)


def test_other_prompt_tokens_and_answers_that_ended_are_said() -> None:
    given = answers(FakeReference())
    given["batches"][2][0]["prompt"] = [0]
    given["batches"][1][3] |= {"tokens": [], "logprobs": [], "reason": "error"}
    _, adapters, frames = parity.compare(checked(), V1, given, references(FakeReference()))
    assert "(adapter of video 1) was not answered: 0 tokens, ended by error" in adapters.line
    assert "(frames of video 1) has other tokens" in str(frames.trouble)
    assert adapters.line.startswith("V1 runner, graphs NONE, float32: adapters and base rows: FAILED")


def test_adapters_without_an_effect_show_nothing() -> None:
    reference = FakeReference(reach=0.0)
    _, adapters, _ = parity.compare(checked(), V1, answers(reference), references(reference))
    assert "with video 1, video 2, video 3 and without an adapter the answers are the same" in str(adapters.trouble)


@pytest.mark.parametrize("variant", [Variant("V2", graphs=False), Variant("V1", graphs=True)])
def test_an_engine_that_ran_another_way_than_it_was_asked_shows_nothing(variant: Variant) -> None:
    reference = FakeReference()
    found = list(parity.compare(checked(), variant, answers(reference), references(reference)))
    assert all(f"was to have {variant.name}" in str(trouble) for trouble in troubles(found))


def test_a_gpu_has_both_runners_with_and_without_graphs() -> None:
    assert {(one.runner, one.graphs) for one in parity.variants(True)} == {
        ("V1", False),
        ("V1", True),
        ("V2", False),
        ("V2", True),
    }
    assert parity.variants(False) == [V1]
