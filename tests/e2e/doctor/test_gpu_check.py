"""`f2l-vllm doctor --gpu-check` on a machine without a GPU: a real engine beside transformers and peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.doctor import adapters, parity
from f2l_vllm.doctor.parity import Checked, Variant
from f2l_vllm.server_process import free_port


def test_it_agrees_here_and_a_planted_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("F2L_HOME", str(tmp_path / "home"))
    kept: dict[str, Any] = {}
    make, ask = adapters.make, parity.ask

    def made_once(subject: Any, _: Path, has_gpu: bool) -> Any:
        if "made" not in kept:
            (folder := tmp_path / "made").mkdir()
            kept["made"] = make(subject, folder, has_gpu)
        return kept["made"]

    def asked_once(*given: Any) -> Any:
        if "answers" not in kept:
            kept["answers"] = ask(*given)
        return kept["answers"]

    monkeypatch.setattr(adapters, "make", made_once)
    monkeypatch.setattr(parity, "ask", asked_once)
    results = tmp_path / "results"
    command = ["doctor", "--gpu-check", "--no-suites", "--results", str(results), "--port", str(free_port())]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    findings = json.loads((results / "check.json").read_text())["findings"]
    assert [finding["name"].split(": ")[-1] for finding in findings] == [
        "adapters made on the CPU in bf16, as a GPU reads",
        "text",
        "adapters and base rows",
        "frames",
    ]
    assert all(0 < finding["difference"] < finding["allowed"] for finding in findings)
    assert "Everything agrees" in (results / "README.md").read_text()

    # The same engine, had it given one question's answer another video's adapter.
    faulty = copy.deepcopy(kept["answers"])
    first, _, second, *_ = faulty["batches"][1]
    for name in ("tokens", "logprobs"):
        first[name], second[name] = second[name], first[name]
    kept["answers"] = faulty
    ran = CliRunner().invoke(app, [*command, "--overwrite"])
    assert ran.exit_code == 1
    assert (
        "1 of 4 checks disagree or did not run: V1 runner, graphs NONE, float32: adapters and base rows" in ran.output
    )
    assert "has another model's answer" in ran.output


def test_an_engine_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 512}}')
    videos = {name: tmp_path / f"{name}.mp4" for name in ("one", "two", "three")}
    for path in videos.values():
        path.write_bytes(b"")
    nowhere = Checked(tmp_path, videos, 16, ("down_proj",), videos, "no-such-dtype")
    with pytest.raises(parity.EngineFailed, match=r"(?s)gave no answers \(exit code 1\).*no-such-dtype"):
        parity.ask(nowhere, Variant("V1", graphs=False), tmp_path)
