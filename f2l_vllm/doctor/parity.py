"""An engine against transformers and peft on the same device: text, adapters with base rows among them, frames.

The engine answers greedily, and the reference in fp32 reads the engine's tokens. Each token's log-probability must be
the reference's, and no other token may be likelier; of both the mean over an answer counts. An engine in bf16 may be as
far from fp32 as transformers in bf16 are on the same tokens, times a factor.
"""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from f2l_vllm.cpu.plugin import openmp_defaults
from f2l_vllm.doctor.findings import Finding
from f2l_vllm.doctor.reference import Reference
from f2l_vllm.hypernetwork.ranks import smallest_rank

# Means over an answer. `f2l-tiny` on a CPU: 2e-6 at most in fp32. In bf16 an answer from an adapter is 0.006 away,
# where transformers are 0.006 away, and the base model 0.55 at least.
TOLERANCE = 1e-4
_LEAST_BF16, _TIMES_BF16 = 0.01, 3.0
_UNIT = "of a log-probability"
_MAX_TOKENS = 12
_SLOTS = 2
_SHORT, _LONG = "What is the background?", "Describe the video: what is shown in it, and which way does it move?"
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """A question, from an adapter or from a video's frames, by their names, or from both or neither."""

    question: str
    adapter: str | None = None
    video: str | None = None


def batches(adapters: Sequence[str], videos: Sequence[str]) -> dict[str, list[Row]]:
    """What is asked in one batch each: with three adapters, more than the engine has slots."""
    first, second, third = adapters
    mixed = [first, None, second, first, third, None, second, third]
    return {
        "text": [Row(_SHORT), Row(_LONG), Row(f"{_SHORT} {_LONG} " * 6)],
        "adapters and base rows": [
            Row(" ".join([_SHORT] * (1 + 3 * (place % 3)) + [_LONG] * (place % 2)), adapter)
            for place, adapter in enumerate(mixed)
        ],
        "frames": [
            *(Row(_LONG, None, name) for name in videos),
            Row(_SHORT, first, videos[-1]),
            Row(_SHORT, second),
        ],
    }


@dataclass(frozen=True)
class Variant:
    """An engine to check: which model runner, and whether it replays CUDA graphs."""

    runner: str
    graphs: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.runner} runner, graphs {'on' if self.graphs else 'off'}"


def variants(has_gpu: bool) -> list[Variant]:
    """Those that run here: this package's CPU platform has vLLM's V1 runner and no graphs."""
    if not has_gpu:
        return [Variant("V1", False)]
    return [Variant(runner, graphs) for runner in ("V1", "V2") for graphs in (False, True)]


class EngineFailed(RuntimeError):
    """An engine gave no answers; the message holds the end of its log."""


@dataclass(frozen=True)
class Checked:
    """What engine and reference are given.

    Attributes:
        model: directory.
        adapters: PEFT directories by name; `rank` and `modules`: of all of them.
        videos: files by name.
        dtype: in which the engine computes.
    """

    model: Path
    adapters: Mapping[str, Path]
    rank: int
    modules: Sequence[str]
    videos: Mapping[str, Path]
    dtype: str

    def batches(self) -> dict[str, list[Row]]:
        """What is asked."""
        return batches(list(self.adapters), list(self.videos))


def ask(checked: Checked, variant: Variant, folder: Path) -> dict[str, Any]:
    """Run one engine, and return what it says (`engine_child.main`).

    Raises:
        EngineFailed: it did not answer.
    """
    request, answers, log = (folder / f"{variant.name}{end}" for end in (".json", "-answers.json", ".log"))
    request.write_text(json.dumps(_request(checked, variant)))
    env = {
        **os.environ,
        **openmp_defaults(os.environ),
        "VLLM_PLUGINS": "f2l,f2l_cpu",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(variant.runner == "V2")),
    }
    command = [sys.executable, "-m", "f2l_vllm.doctor.engine_child", str(request), str(answers)]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=env) as child,
    ):
        try:
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    if code or not answers.exists():
        tail = log.read_text(errors="replace")[-4000:]
        raise EngineFailed(f"the engine ({variant.name}) gave no answers (exit code {code}); end of its log:\n{tail}")
    found: dict[str, Any] = json.loads(answers.read_text())
    return found


def _request(checked: Checked, variant: Variant) -> dict[str, Any]:
    longest = json.loads((checked.model / "config.json").read_text())["text_config"]["max_position_embeddings"]
    engine = {
        "dtype": checked.dtype,
        "max_model_len": min(4096, longest),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": (256 if checked.dtype == "float32" else 2048) << 20,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": not variant.graphs,
        "enable_lora": True,
        "max_loras": _SLOTS,
        "max_cpu_loras": len(checked.adapters),
        "max_lora_rank": smallest_rank(checked.rank),
        "lora_target_modules": list(checked.modules),
        "limit_mm_per_prompt": {"video": 1},
    }
    rows = [
        [{"content": _for_engine(row, checked.videos), "adapter": row.adapter} for row in some]
        for some in checked.batches().values()
    ]
    adapters = {name: str(path) for name, path in checked.adapters.items()}
    return {
        "model": str(checked.model),
        "engine": engine,
        "adapters": adapters,
        "batches": rows,
        "max_tokens": _MAX_TOKENS,
    }


def _for_engine(row: Row, videos: Mapping[str, Path]) -> list[dict[str, Any]]:
    text = {"type": "text", "text": row.question}
    if row.video is None:
        return [text]
    data = base64.b64encode(videos[row.video].read_bytes()).decode()
    return [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}, text]


def _for_reference(row: Row, videos: Mapping[str, Path]) -> list[dict[str, Any]]:
    video = [] if row.video is None else [{"type": "video", "path": str(videos[row.video])}]
    return [*video, {"type": "text", "text": row.question}]


class References:
    """The reference in fp32 and, for an engine in another dtype, the same model in that one."""

    def __init__(self, checked: Checked, device: torch.device) -> None:
        adapters = dict(checked.adapters)
        self.exact = Reference(checked.model, adapters, torch.float32, device)
        self.rounded: Reference | None = None
        if checked.dtype != "float32":
            self.rounded = Reference(checked.model, adapters, getattr(torch, checked.dtype), device)


def compare(checked: Checked, variant: Variant, answers: dict[str, Any], references: References) -> Iterator[Finding]:
    """A finding for each batch."""
    ran = f"{answers['runner']} runner, graphs {answers['graphs']}, {answers['dtype']}"
    mistaken = None
    if answers["runner"] != variant.runner or variant.graphs == (answers["graphs"] == "NONE"):
        mistaken = f"the engine was to have {variant.name}, and had {ran}"
    for (name, rows), given in zip(checked.batches().items(), answers["batches"], strict=True):
        compared = [_compare_row(checked, row, one, references) for row, one in zip(rows, given, strict=True)]
        worst = max(compared, key=lambda one: one.difference / one.allowed)
        trouble = mistaken or worst.trouble
        if trouble is None and not worst.difference <= worst.allowed:
            trouble = f"{_told(worst.row)} has another model's answer"
        reach: dict[str, float] = {}
        for one in compared:
            if one.row.adapter is not None:
                reach[one.row.adapter] = max(reach.get(one.row.adapter, 0.0), one.reach / one.allowed)
        if trouble is None and (blind := [adapter for adapter, times in reach.items() if not times > 1]):
            trouble = f"with {', '.join(blind)} and without an adapter the answers are the same: nothing is shown"
        count = sum(len(one["tokens"]) for one in given)
        said = f"transformers + peft ({len(rows)} answers in one batch, {count} tokens)"
        difference = worst.difference if math.isfinite(worst.difference) else None
        yield Finding(f"{ran}: {name}", said, difference, worst.allowed, _UNIT, trouble)


@dataclass(frozen=True)
class _Compared:
    """One answer. `reach`: how far the base model is from the adapter."""

    row: Row
    difference: float
    allowed: float = TOLERANCE
    reach: float = 0.0
    trouble: str | None = None


def _compare_row(checked: Checked, row: Row, given: dict[str, Any], references: References) -> _Compared:
    exact, tokens = references.exact, given["tokens"]
    inputs: Inputs = exact.chat(_for_reference(row, checked.videos))
    if given["prompt"] != inputs["input_ids"][0].tolist():
        return _Compared(row, float("inf"), trouble=f"the prompt of {_told(row)} has other tokens")
    if len(tokens) != _MAX_TOKENS or len(given["logprobs"]) != len(tokens):
        ended = f"{len(tokens)} tokens, ended by {given['reason']}"
        return _Compared(row, float("inf"), trouble=f"{_told(row)} was not answered: {ended}")
    right = exact.follow(inputs, tokens, row.adapter)
    difference = max(_apart(given["logprobs"], right.logprobs), _apart(right.best, right.logprobs))
    allowed, reach = TOLERANCE, 0.0
    if references.rounded is not None:
        rounded = references.rounded.follow(inputs, tokens, row.adapter)
        allowed = _LEAST_BF16 + _TIMES_BF16 * _apart(rounded.logprobs, right.logprobs)
    if row.adapter is not None:
        reach = _apart(exact.follow(inputs, tokens).logprobs, right.logprobs)
    return _Compared(row, difference, allowed, reach)


def _apart(some: Sequence[float], others: Sequence[float]) -> float:
    return sum(abs(one - other) for one, other in zip(some, others, strict=True)) / len(some)


def _told(row: Row) -> str:
    named = [f"adapter of {row.adapter}"] * (row.adapter is not None)
    named += [f"frames of {row.video}"] * (row.video is not None)
    return f"{row.question[:40]!r} ({', '.join(named) or 'base model'})"
