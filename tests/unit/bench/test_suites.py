"""Suites are data: every one that ships can be read, and what cannot be meant is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.arms import ARMS
from f2l_vllm.bench.suite import parse_changes


@pytest.mark.parametrize("name", suites.names())
def test_every_suite_that_ships_is_whole(name: str) -> None:
    assert suites.load(name).suite == name


def test_all_six_ship() -> None:
    assert suites.names() == ["amortise", "capacity", "latency", "ramp", "tax", "throughput"]


def test_a_key_may_be_replaced_by_one_value_or_several() -> None:
    one = suites.load("latency", {"frames": 8, "resolution": [224, 512], "arms": "adapter"})
    assert (one.frames, one.resolution, one.arms) == ((8,), (224, 512), ("adapter",))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("latency", {"fames": [8]}, "the suite latency has no key 'fames'"),
        ("latency", {"frames": [0]}, "frames.0: Input should be greater than 0"),
        ("latency", {"frames": []}, "frames: Tuple should have at least 1 item"),
        ("latency", {"arms": ["adapter", "tea-leaves"]}, "arms are different ones of adapter, adapter-cold"),
        ("latency", {"arms": ["adapter", "adapter"]}, "arms are different ones"),
        ("latency", {"suite": "speed"}, "'latency', 'amortise', 'throughput', 'tax', 'capacity', 'ramp'"),
        ("tax", {"arms": ["adapter"]}, "the suite tax has no key 'arms'"),
        ("tax", {"output_tokens": 1}, "output_tokens: Input should be greater than or equal to 2"),
        ("throughput", {"arrivals": "poisson"}, "request_rate"),
        ("throughput", {"request_rate": 2}, "request_rate"),
        ("throughput", {"slo": {"tfft": 1}}, "has no key"),
        ("throughput", {"arms": ["adapter-cold"]}, "measure it with the suite latency"),
        ("tax", {"base_url": "http://a"}, "the suite tax asks no server that runs already"),
        ("capacity", {"base_url": "http://a"}, "it needs the model's files"),
        ("latency", {"base_url": "somewhere"}, "base_url"),
        ("latency", {"base_url": "http://a", "serve_flags": "--fps 2"}, "base_url starts none"),
        ("ramp", {"slo": {}}, "slo needs a limit"),
        ("ramp", {"base_url": "somewhere"}, "base_url"),
        ("amortise", {"arms": ["adapter-cold"]}, "the first question of the arm adapter"),
    ],
)
def test_what_cannot_be_meant_is_named(name: str, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=r"^[a-z]+\.yaml: ") as refused:
        suites.load(name, changes)
    assert said in str(refused.value)


def test_a_suite_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("suite: capacity\nframes: 12\n")
    assert suites.load(str(path)).frames == (12,)


@pytest.mark.parametrize("text", ["- a list\n", "suite: [unclosed\n"])
def test_a_file_that_is_no_suite_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        suites.load(str(path))


def test_no_such_suite_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="amortise, capacity, latency, ramp, tax, throughput"):
        suites.load("speed")


def test_flags_become_keys() -> None:
    lists = {"frames": "8,32", "arms": "adapter", "streams": None}
    changes = parse_changes(["output-tokens=16", "slo={ttft: 500}"], lists, {"rounds": 1, "videos": None})
    assert changes == {"frames": [8, 32], "arms": "adapter", "rounds": 1, "output_tokens": 16, "slo": {"ttft": 500}}


def test_a_pair_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="output_tokens=16"):
        parse_changes(["output_tokens"], {}, {})


def test_arms_with_the_same_server_share_it_and_merging_ones_say_how_much() -> None:
    kinds = {name: arm.server(0.7, 4096) for name, arm in ARMS.items()}
    assert kinds["adapter"] == kinds["adapter-cold"] == kinds["frames"]
    assert len(set(kinds.values())) == 4
    assert kinds["frames-merged"].flags[-2:] == ("--video-pruning-rate", "0.7")
    assert kinds["adapter-merged"].env == (("F2L_MERGE_RATE", "0.7"),)
    assert [name for name, arm in ARMS.items() if arm.merges] == ["adapter-merged", "frames-merged"]
    assert [name for name, arm in ARMS.items() if arm.anywhere] == ["adapter", "adapter-cold", "frames", "text"]
