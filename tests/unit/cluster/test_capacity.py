"""How many servers: costs, overload, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.cluster.capacity import POLICIES, estimate
from f2l_vllm.cluster.simulation import Scenario

SMALL = Scenario(servers=2, videos=20, places=20, concurrency=4, rate=10.0)  # of 22 that two servers can answer
COMMAND = ["plan", "--replicas", "1,2", "--videos", "20", "--places", "20", "--concurrency", "4"]


def said(*arguments: str) -> str:
    """What a refused command says."""
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    return result.stderr


def test_every_engine_is_paid_for_at_the_rate_that_is_asked_for() -> None:
    row = estimate(SMALL, "least-loaded", [1, 2], price=3)
    assert row["engine_hours_per_million"] == pytest.approx(2 * 1e6 / 10 / 3600)
    assert row["price_per_million"] == pytest.approx(3 * row["engine_hours_per_million"])
    assert row["throughput_of_resident"]["median"] == pytest.approx(1, rel=0.001)


def test_servers_that_always_have_work_cost_what_they_answer() -> None:
    row = estimate(Scenario(servers=2, videos=20, places=20, concurrency=4), "least-loaded", [1])
    assert row["engine_hours_per_million"] == pytest.approx(2 * 1e6 / (2 * 4 / 0.36) / 3600, rel=0.001)
    assert row["price_per_million"] is None


@pytest.mark.parametrize(("rate", "overloaded"), [(21.0, False), (23.0, True)])
def test_more_questions_than_they_answer_overload_servers(rate: float, overloaded: bool) -> None:
    row = estimate(Scenario(servers=2, videos=20, places=20, concurrency=4, rate=rate), "least-loaded", [1])
    assert row["overloaded"] == overloaded
    assert (row["added_p99_ms"] is None) == overloaded
    assert row["questions_per_second_at_most"]["min"] == pytest.approx(2 * 4 / 0.36, rel=0.001)


def test_the_spread_is_over_the_seeds() -> None:
    scenario = Scenario(servers=2, videos=200, places=20, concurrency=4)
    one, other, both = (estimate(scenario, "haproxy", seeds)["hit_rate"] for seeds in ([1], [2], [1, 2]))
    assert one["min"] == one["median"] == one["max"] != other["median"]
    assert (both["min"], both["max"]) == tuple(sorted((one["median"], other["median"])))


def test_the_command_shows_and_writes_each_number_of_servers_under_each_policy(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result = CliRunner().invoke(app, [*COMMAND, "--rate", "15", "--seeds", "1", "--load-ms", "2", "--json", str(path)])
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert [(row["servers"], row["policy"]) for row in found["rows"]] == [
        (n, name) for n in (1, 2) for name in POLICIES
    ]
    assert [row["overloaded"] for row in found["rows"]] == [True] * 3 + [False] * 3
    assert (found["scenario"]["load_s"], found["scenario"]["rate"], found["seeds"]) == (0.002, 15, 1)
    assert "overloaded" in result.stdout
    assert "1.00 ±0.00" in result.stdout


def test_what_cannot_be_planned_is_refused_in_a_sentence(tmp_path: Path) -> None:
    videos = ("--videos", "20")
    assert (
        said(*videos) == "f2l-vllm plan: give --frames, --questions and --memory, or --replicas for how many servers\n"
    )
    assert said(*videos, "--zipf", "1") == "f2l-vllm plan: --zipf goes with --replicas\n"
    servers = (*videos, "--replicas", "2")
    assert said(*servers, "--frames", "8") == "f2l-vllm plan: --frames does not go with --replicas\n"
    assert said(*servers, "--fetch-ms", "-1").startswith("f2l-vllm plan: Invalid value for '--fetch-ms': ")
    assert said(*servers, "--rate", "0") == (
        "f2l-vllm plan: rate is 0.0: give a number above 0, or none for servers that always have work\n"
    )
    assert said(*servers, "--policies", "random") == (
        "f2l-vllm plan: no policy 'random': give one of least-loaded, haproxy, warm-first\n"
    )
    assert said(*videos, "--replicas", "two") == (
        "f2l-vllm plan: --replicas 'two': give numbers of servers by comma, e.g. 2,4,8\n"
    )
    assert said(*videos, "--replicas", "2,0") == "f2l-vllm plan: servers is 0: give a number from 1 on\n"
    (tmp_path / "there").touch()
    assert "is there already" in said(*servers, "--json", str(tmp_path / "there"))
