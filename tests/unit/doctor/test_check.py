"""The command: what it writes, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from f2l_vllm.bench import run
from f2l_vllm.bench.suites.tax import adapters_of, cells
from f2l_vllm.cli import gpus
from f2l_vllm.cli.main import app
from f2l_vllm.doctor import adapters, check, parity
from f2l_vllm.doctor.findings import Finding
from f2l_vllm.server_process import ServerFailed, free_port

GOOD = Finding("V1 runner: text", "transformers + peft", 1e-6, 1e-4, "of a log-probability")
BAD = Finding("V1 runner: frames", "transformers + peft", 0.4, 1e-4, "of a log-probability", "it sees another video")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`command(findings, *flags)`: the command with these comparisons."""
    monkeypatch.setenv("F2L_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gpus, "find", gpus.Gpus)
    monkeypatch.setattr("f2l_vllm.cli.doctor._device", lambda: ("no GPU", "1 GiB", None))

    def call(findings: list[Finding], *flags: str) -> Result:
        monkeypatch.setattr(check, "compared", lambda *_: iter(findings))
        into = ["--results", str(tmp_path / "results"), "--port", str(free_port())]
        return CliRunner().invoke(app, ["doctor", "--gpu-check", *into, *flags])

    return call


def test_what_agrees_ends_with_0_and_a_page(command: Callable[..., Result], tmp_path: Path) -> None:
    ended = command([GOOD], "--no-suites")
    assert ended.exit_code == 0, ended.output
    assert GOOD.line in ended.output
    assert "all 1 checks agree" in ended.output
    written = json.loads((tmp_path / "results" / "check.json").read_text())
    assert written["findings"][0]["difference"] == 1e-6
    assert written["machine"]["cores"] >= 1
    page = (tmp_path / "results" / "README.md").read_text()
    assert "Everything agrees. Answers are compared with f2l-tiny." in page
    assert f"- {GOOD.line}" in page


def test_what_disagrees_ends_with_1_and_is_named(command: Callable[..., Result], tmp_path: Path) -> None:
    ended = command([GOOD, BAD], "--no-suites")
    assert ended.exit_code == 1
    assert "1 of 2 checks disagree or did not run: V1 runner: frames" in ended.output
    assert "it sees another video" in ended.output
    assert "1 of 2 checks disagree" in (tmp_path / "results" / "README.md").read_text()


def test_results_are_not_replaced_unasked(command: Callable[..., Result]) -> None:
    assert command([GOOD], "--no-suites").exit_code == 0
    again = command([GOOD], "--no-suites")
    assert again.exit_code == 2
    assert "--overwrite replaces it" in again.output
    assert command([GOOD], "--no-suites", "--overwrite").exit_code == 0


def test_a_suite_that_cannot_be_measured_is_a_finding_and_the_next_goes_on(
    command: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def measure(suite: Any, subject: Any, folder: Path, path: Path, *_: Any) -> None:
        asked.append((suite.suite, subject.name))
        if suite.suite == "tax":
            raise ServerFailed("no server")
        repository = Path(__file__).parents[3] / "benchmarks" / "results"
        path.write_text((repository / f"{suite.suite}-tiny.json").read_text())

    def internalized(*given: Any) -> None:
        given[-1].write_text((Path(__file__).parent / "internalize.json").read_text())

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(check, "_internalize", internalized)
    ended = command([GOOD])
    assert ended.exit_code == 1
    assert asked == [("latency", "tiny"), ("tax", "tiny"), ("throughput", "tiny")]
    assert "tax of tiny: FAILED: no server" in ended.output
    page = (tmp_path / "results" / "README.md").read_text()
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Does it agree?",
        "## latency: tiny in float32",
        "## throughput: tiny in float32",
        "## internalize: tiny in bfloat16",
    ]


@pytest.mark.parametrize("has_gpu", [False, True])
def test_every_suite_has_keys_that_it_knows(has_gpu: bool) -> None:
    for name, changes in (check._ON_GPU if has_gpu else check._ON_CPU).items():
        if name != "internalize":
            assert check.suites.load(check.suite_of(name), changes).suite == check.suite_of(name)


def test_a_gpu_is_measured_where_it_matters() -> None:
    loaded = {
        name: check.suites.load(check.suite_of(name), changes)
        for name, changes in check._ON_GPU.items()
        if name != "internalize"
    }
    for name, frames in (("latency", 12), ("long-latency", 512)):
        one = loaded[name]
        assert frames in one.frames
        assert frames <= one.count_above  # timed
        assert {"adapter", "adapter-cold", "frames"} <= set(one.arms)  # cold: from the upload to the answer
    for name, is_tuned in (("tax", False), ("tuned-tax", True)):
        tax = loaded[name]
        assert any(32 in adapters_of(tax, cell) for cell in cells(tax))
        assert tax.tuned == is_tuned
    assert max(check._ON_GPU["internalize"]) == 1024  # a worker's peak


def test_an_engine_that_does_not_answer_is_a_finding_and_the_next_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = adapters.Adapter({"down_proj": (torch.ones(1, 2, 3), torch.ones(1, 2, 3))}, 1.0)
    made = adapters.Made({}, {"video 1": one}, {"video 1": tmp_path})

    def ask(_: Any, variant: parity.Variant, __: Path) -> dict[str, Any]:
        if variant.runner == "V1":
            raise parity.EngineFailed(f"{variant.name} ended")
        return {}

    monkeypatch.setattr(adapters, "make", lambda *_: (made, GOOD))
    monkeypatch.setattr(parity, "ask", ask)
    monkeypatch.setattr(parity, "References", lambda *_: None)
    monkeypatch.setattr(parity, "compare", lambda _, variant, *__: iter([Finding(variant.name, "it", 0.0, 1.0)]))
    subject = check.shapes.Subject("it", "it", tmp_path, tmp_path, "bfloat16")
    found = list(check.compared(check.Machine(True, subject), tmp_path))
    assert [(one.name, one.trouble) for one in found[1:]] == [
        ("V1 runner, graphs off", "V1 runner, graphs off ended"),
        ("V1 runner, graphs on", "V1 runner, graphs on ended"),
        ("V2 runner, graphs off", None),
        ("V2 runner, graphs on", None),
    ]
