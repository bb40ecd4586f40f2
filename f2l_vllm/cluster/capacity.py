"""What a number of servers comes to under each policy, over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from f2l_vllm.cluster.policy import HAProxyHash, LeastLoaded, Policy, WarmFirst
from f2l_vllm.cluster.simulation import Outcome, Scenario, Simulation

POLICIES: dict[str, Callable[[Scenario], Policy]] = {
    "least-loaded": lambda scenario: LeastLoaded(),
    "haproxy": lambda scenario: HAProxyHash(scenario.names),
    "warm-first": lambda scenario: WarmFirst(scenario.places, scenario.concurrency),
}
_FIGURES = ("hit_rate", "store_share", "added_median_ms", "added_p99_ms", "imbalance")


def estimate(scenario: Scenario, policy: str, seeds: Sequence[int], price: float | None = None) -> dict[str, Any]:
    """Figures of `scenario` under a policy of `POLICIES`, each with its median, least and most over `seeds`.

    The throughput is that of servers which always have work, as a share of what they answered if every adapter were in
    memory. A rate above it makes them `overloaded`, without other figures: those would grow for as long as it lasts.
    Every engine is paid for, idle or not.

    Args:
        price: of one engine for an hour.
    """
    saturated = _runs(replace(scenario, rate=None), policy, seeds)
    throughput = _spread([outcome.throughput for outcome in saturated])
    overloaded = scenario.rate is not None and scenario.rate > throughput["min"]
    outcomes = saturated if scenario.rate is None else [] if overloaded else _runs(scenario, policy, seeds)
    answered = throughput["median"] if scenario.rate is None else scenario.rate
    hours = scenario.servers * 1e6 / answered / 3600
    return {
        "servers": scenario.servers,
        "policy": policy,
        "overloaded": overloaded,
        "questions_per_second_at_most": throughput,
        "throughput_of_resident": {name: value / scenario.ideal for name, value in throughput.items()},
        **{name: _spread([getattr(outcome, name) for outcome in outcomes]) if outcomes else None for name in _FIGURES},
        "engine_hours_per_million": None if overloaded else hours,
        "price_per_million": None if overloaded or price is None else hours * price,
        "settled": all(outcome.settled for outcome in saturated + outcomes),
    }


def plan(
    scenario: Scenario, servers: Sequence[int], policies: Sequence[str], seeds: int, price: float | None = None
) -> dict[str, Any]:
    """`estimate` for each number of servers and each policy, over `seeds` seeds.

    Raises:
        ValueError: there is no such policy, or a number of servers is out of range.
    """
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(f"no policy {policy!r}: give one of {', '.join(POLICIES)}")
    scenarios = [replace(scenario, servers=count) for count in servers]
    rows = [estimate(one, policy, range(1, seeds + 1), price) for one in scenarios for policy in policies]
    return {"scenario": {**asdict(scenario), "servers": list(servers)}, "seeds": seeds, "price": price, "rows": rows}


def _runs(scenario: Scenario, policy: str, seeds: Sequence[int]) -> list[Outcome]:
    return [Simulation(scenario, POLICIES[policy](scenario), seed).run() for seed in seeds]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
