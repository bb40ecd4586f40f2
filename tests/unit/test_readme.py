"""README is short, and what it says is so: figures, versions, commands, links."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from f2l_vllm import vllm_versions
from tests.support import ROOT

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Result = dict[str, Any]


def row(arm: str, key: Callable[[Result], float]) -> Callable[[Result], float]:
    """Of the row of 32 frames."""
    return lambda result: key(next(r for r in result["rows"] if (r["arm"], r["frames"]) == (arm, 32)))


def first_token(row: Result) -> float:
    return float(row["ttft_ms"]["median"])


def over_adapter(result: Result, arm: str) -> float:
    return float(next(r["ttft"] for r in result["ratios"] if (r["arm"], r["frames"]) == (arm, 32)))


def score(arm: str) -> Callable[[Result], float]:
    return lambda result: result["arms"][arm]["score"] * 100


LATENCY, SERVER = "latency-500m", "quality/server"
FIGURES: dict[str, tuple[str, Callable[[Result], float], str]] = {
    "62 ms": (LATENCY, row("adapter", first_token), "{:.0f} ms"),
    "22.1 s": (LATENCY, row("frames", lambda r: first_token(r) / 1e3), "{:.1f} s"),
    "356 times": (LATENCY, lambda result: over_adapter(result, "frames"), "{:.0f} times"),
    "160 ms": (LATENCY, row("frames-cached", first_token), "{:.0f} ms"),
    "2.6 times": (LATENCY, lambda result: over_adapter(result, "frames-cached"), "{:.1f} times"),
    "23 tokens": (LATENCY, row("adapter", lambda r: r["prompt_tokens"]), "{} tokens"),
    "2,520": (LATENCY, row("frames", lambda r: r["prompt_tokens"]), "{:,}"),
    "7.2 MB": (LATENCY, row("adapter", lambda r: r["state_bytes"] / 1e6), "{:.1f} MB"),
    "84 MB": (LATENCY, row("frames", lambda r: r["state_bytes"] / 1e6), "{:.0f} MB"),
    "26.0 s": (LATENCY, row("adapter-cold", lambda r: first_token(r) / 1e3), "{:.1f} s"),
    "98.5 %": (SERVER, score("adapter"), "{:.1f} %"),
    "98.9 %": (SERVER, score("frames"), "{:.1f} %"),
    "29.9 %": (SERVER, score("none"), "{:.1f} %"),
}


def test_readme_is_short_and_begins_with_a_command():
    assert len(README.split()) <= 700
    assert len(README.split("```sh")[0].split()) <= 120


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_the_committed_results(figure: str) -> None:
    name, of, form = FIGURES[figure]
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert form.format(of(result)) == figure
    assert figure in " ".join(README.split())


def test_what_it_costs_has_no_other_figure() -> None:
    text = " ".join(re.search(r"## What it costs\n(.*?)\n## ", README, re.DOTALL)[1].split())
    text = text.replace("SmolVLM2-500M", "").replace("bf16", "").replace("2 CPU cores", "").replace("32 frames", "")
    for figure in FIGURES:
        text = text.replace(figure, "")
    assert re.findall(r"\d[\d.,]*", re.sub(r"\(.*?\.(png|md)\)", "", text)) == []


def test_badges_are_true() -> None:
    badges = dict(re.findall(r"img\.shields\.io/badge/(\w+)-(.+?)-\w+\)", README))
    assert badges["licence"].replace("--", "-") == PROJECT["license"].split(" AND ")[0]
    assert ">=" + badges["python"].removesuffix("+") == PROJECT["requires-python"]
    assert badges["vLLM"].split(",_") == list(vllm_versions.TORCH)
    assert " and ".join(vllm_versions.TORCH) in README
    assert f": 3 - {badges['status'].title()}" in " ".join(PROJECT["classifiers"])
    assert set(badges) == {"licence", "python", "vLLM", "status"}


def test_the_citation_names_this_version() -> None:
    assert f"version = {{{PROJECT['version']}}}" in README


def test_the_model_is_as_small_as_said() -> None:
    report = json.loads((ROOT / "f2l_vllm" / "models" / "f2l-tiny" / "training.json").read_text())
    assert f"a model of {sum(report['bytes'].values()) / 1e6:.1f} MB" in README
