"""All checks of a machine, one after the other: adapters, engines, and then what answers and adapters cost."""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from openai import APIError

from f2l_vllm.bench import internalize, record, run, shapes
from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.client import WrongAnswer
from f2l_vllm.bench.results_file import Say
from f2l_vllm.bench.vllm_client import TrafficFailed
from f2l_vllm.doctor import adapters, page, parity
from f2l_vllm.doctor.findings import Finding
from f2l_vllm.files import write_whole
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.server_process import ServerFailed

CHECK = "check.json"
# What is measured, by shape: the changed keys of each suite, and the numbers of frames of `internalize`. A suite's name
# is the end of its key.
_TAX_ON_GPU = {"streams": [1, 8, 32, 64], "adapters": [0, 1, 8, 32, 64]}
_ON_GPU: dict[str, Any] = {
    "latency": {"frames": [8, 12, 32, 128], "resolution": [384], "count_above": 128},
    "long-latency": {  # one server: the KV of such prompts takes much of a GPU
        **{"arms": ["adapter", "adapter-cold", "frames"], "frames": [512], "resolution": [384]},
        **{"count_above": 512, "rounds": 3, "servers_at_once": 1},
    },
    "tax": _TAX_ON_GPU,
    "tuned-tax": {**_TAX_ON_GPU, "tuned": True},
    "throughput": {"concurrency": [16, 64]},
    "internalize": [8, 12, 32, 128, 512, 1024],
}
_ON_CPU: dict[str, Any] = {
    "latency": {"frames": [8], "resolution": [224], "rounds": 1},
    "tax": {"streams": [2], "adapters": [0, 2], "rounds": 1, "output_tokens": 16, "prefill_requests": 2},
    "throughput": {
        "arms": ["adapter", "frames"],
        **{"videos": 2, "concurrency": [2], "popularity": ["uniform"], "requests": 8, "frames_requests": 4},
        "rounds": 1,
    },
    "internalize": [8],
}
_SHAPES = {True: ("500m", "2.2b"), False: (shapes.TINY,)}


@dataclass(frozen=True)
class Machine:
    """What is checked.

    Attributes:
        has_gpu: whether vLLM and the workers compute on one.
        subject: the model whose answers are compared.
    """

    has_gpu: bool
    subject: shapes.Subject


def check(machine: Machine, into: Path, say: Say, *, with_suites: bool) -> list[Finding]:
    """Compare, measure, and write all of it.

    Args:
        into: folder for `check.json`, a file for each suite and shape, and the page `README.md`.
        say: told of every comparison and measurement as it is made.
        with_suites: measure costs, too.

    Returns:
        the findings; those with `trouble` disagree.
    """
    into.mkdir(parents=True, exist_ok=True)
    found: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="f2l-doctor-", ignore_cleanup_errors=True) as name:
        for finding in compared(machine, Path(name)):
            say(finding.line)
            found.append(finding)
        configuration = {"model": machine.subject.name, "dtype": machine.subject.dtype, "suites": with_suites}
        header = record.header(configuration)
        findings = [asdict(finding) for finding in found]
        write_whole(into / CHECK, json.dumps({**header, "findings": findings}, indent=1) + "\n")
        results: list[Path] = []
        if with_suites:
            for path, failure in _measured(machine.has_gpu, Path(name), into, say):
                if failure is None:
                    results.append(path)
                    continue
                say(failure.line)
                found.append(failure)
        write_whole(into / page.NAME, page.markdown(header, found, results))
    return found


def compared(machine: Machine, folder: Path) -> Iterator[Finding]:
    """Adapters, then every engine that runs here. The engines come before their reference: both are on one device."""
    made, finding = adapters.make(machine.subject, folder, machine.has_gpu)
    yield finding
    one = next(iter(made.adapters.values()))
    checked = parity.Checked(
        machine.subject.directory, made.folders, one.rank, tuple(one.factors), made.videos, machine.subject.dtype
    )
    answers = {}
    for variant in parity.variants(machine.has_gpu):
        try:
            answers[variant] = parity.ask(checked, variant, folder)
        except parity.EngineFailed as error:
            yield _failed(variant.name, error)
    references = parity.References(checked, torch.device("cuda" if machine.has_gpu else "cpu"))
    for variant, given in answers.items():
        yield from parity.compare(checked, variant, given, references)


def _measured(has_gpu: bool, folder: Path, into: Path, say: Say) -> Iterator[tuple[Path, Finding | None]]:
    """Every suite at every shape; one that cannot be measured is a finding, and the next goes on."""
    gc.collect()
    if has_gpu:
        torch.cuda.empty_cache()
    for shape in _SHAPES[has_gpu]:
        for name, changes in (_ON_GPU if has_gpu else _ON_CPU).items():
            path = into / f"{name}-{shape}.json"
            say(f"{name} of {shape}, to {path}")
            try:
                subject = shapes.of_shape(shape, shapes.cache_folder())
                if name == "internalize":
                    _internalize(subject, has_gpu, changes, folder, path)
                else:
                    suite = suites.load(suite_of(name), changes)
                    asyncio.run(run.measure(suite, subject, _kept(folder, shape), path, False, say))
                yield path, None
            except (ValueError, OSError, RuntimeError, APIError, WrongAnswer, ServerFailed, TrafficFailed) as error:
                yield path, _failed(f"{name} of {shape}", error)


def suite_of(key: str) -> str:
    """The suite that a key of what is measured means."""
    return key.rpartition("-")[2]


def _kept(folder: Path, shape: str) -> Path:
    """Where the suites of one shape find each other's videos and adapters."""
    kept = folder / shape
    kept.mkdir(exist_ok=True)
    return kept


def _internalize(subject: shapes.Subject, has_gpu: bool, frames: list[int], folder: Path, path: Path) -> None:
    with adapters.worker_device(has_gpu) as device, tempfile.TemporaryDirectory(dir=folder) as name:
        internalizer = Internalizer.load(subject.directory, subject.hypernetwork, device)
        results = internalize.of_frames(internalizer, Path(name), frames)
        dtype = str(internalizer.model.dtype).removeprefix("torch.")
        record.write(path, {"model": subject.name, "dtype": dtype, "hypernetwork_dtype": "float32"}, results)


def _failed(name: str, error: Exception) -> Finding:
    return Finding(name, trouble=str(error) or repr(error))
