"""What the dashboards and alerts of `launch/` ask of Prometheus, as its own grammar reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser
import yaml
from promql_parser import AggregateExpr, MatchOp, VectorSelector

from tests.support import ROOT

DASHBOARDS = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "launch" / "grafana" / "dashboards").iterdir())
}
RULES = yaml.safe_load((ROOT / "launch" / "prometheus" / "rules.yml").read_text())
OF_PROMETHEUS = {"job", "instance"}  # labels that it gives what it scrapes
# Grafana's own variables, and those of the dashboards.
_FILLED_IN = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*"}


@dataclass(frozen=True)
class Series:
    """What an expression selects: a metric, the labels that it is asked for, and the values that they must have."""

    name: str
    labels: frozenset[str]
    values: tuple[tuple[str, str], ...]


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every panel, with a name for people."""
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            yield f"{name}: {panel['title']}", panel


def alerts() -> Iterator[dict[str, Any]]:
    """Every alert."""
    for group in RULES["groups"]:
        yield from group["rules"]


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression of a panel or an alert, with a name for people."""
    for name, panel in panels():
        for target in panel["targets"]:
            text = target["expr"]
            for variable, value in _FILLED_IN.items():
                text = text.replace(variable, value)
            yield f"{name} {target['refId']}", text
    for alert in alerts():
        yield alert["alert"], alert["expr"]


def series(text: str) -> set[Series]:
    """What an expression selects. A label that it is grouped by must be on each metric below.

    Raises:
        ValueError: it is no PromQL.
    """
    found: set[Series] = set()
    grouped: list[frozenset[str]] = [frozenset()]

    def enter(node: promql_parser.Expr) -> None:
        if isinstance(node, AggregateExpr):
            labels = frozenset(node.modifier.labels) if node.modifier else frozenset()
            grouped.append(grouped[-1] | labels)
        if isinstance(node, VectorSelector):
            assert node.name is not None
            matchers = [(one.name, one.value, one.op) for one in node.matchers.matchers]
            values = tuple((name, value) for name, value, op in matchers if op == MatchOp.Equal)
            found.add(Series(node.name, grouped[-1] | {name for name, _, _ in matchers}, values))

    def leave(node: promql_parser.Expr) -> None:
        if isinstance(node, AggregateExpr):
            grouped.pop()

    promql_parser.walk(promql_parser.parse(text), enter, leave)
    return found


def legend_labels(text: str) -> set[str]:
    """The labels that a legend or an annotation shows."""
    return set(re.findall(r"{{\s*(?:\$labels\.)?(\w+)\s*}}", text))
