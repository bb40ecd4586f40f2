"""Dashboards and alerts are what Grafana and Prometheus take, and ask for what there is."""

import re
import shutil
import subprocess

import pytest
import yaml
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from f2l_vllm.server import metrics
from tests.support import ROOT, promql

LAUNCH = ROOT / "launch"
PROMETHEUS = LAUNCH / "prometheus"
PANELS = dict(promql.panels())
EXPRESSIONS = dict(promql.expressions())
COMPOSE = yaml.safe_load((LAUNCH / "compose.yaml").read_text())
# Of Debian's package `prometheus`: apt-get install prometheus
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt: prometheus)")


def ours():
    """The samples of this package's metrics, with their labels."""
    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            labels = {*metric._labelnames} | ({"le"} if metric._type == "histogram" else set())
            found |= dict.fromkeys(REGISTRY._collector_to_names[metric], labels)
    return found


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_expression_is_promql_over_metrics_that_are_counted(where):
    known, text = ours(), EXPRESSIONS[where]
    selected = promql.series(text)
    assert selected
    for one in selected:
        if one.name.startswith("f2l_"):
            assert one.labels <= known[one.name] | promql.OF_PROMETHEUS, where
        else:
            assert re.match("vllm:|process_|ray_serve_|up$", one.name), where


def test_what_is_no_promql_is_noticed():
    with pytest.raises(ValueError, match="unclosed"):
        promql.series("sum by (job) (f2l_jobs")
    (one,) = promql.series('sum by (part) (f2l_jobs{state="x",job=~"y"})')
    assert one == promql.Series("f2l_jobs", frozenset({"part", "state", "job"}), (("state", "x"),))


@pytest.mark.parametrize("dashboard", promql.DASHBOARDS.values(), ids=promql.DASHBOARDS)
def test_a_dashboard_is_as_grafana_reads_it(dashboard):
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["uid"].startswith("f2l-")
    assert dashboard["description"]
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) <= 8
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells
    used = set(re.findall(r"\$\{?(\w+)", str(panels))) - {"__rate_interval", "labels"}
    assert used == {*variables}


def test_dashboards_have_names_of_their_own():
    for field in ("uid", "title"):
        assert len({one[field] for one in promql.DASHBOARDS.values()}) == len(promql.DASHBOARDS) == 5


@pytest.mark.parametrize("panel", PANELS.values(), ids=PANELS)
def test_a_panel_says_what_it_shows_and_where_from(panel):
    assert panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    steps = defaults["thresholds"]["steps"]
    assert steps[0]["value"] is None
    assert [step["value"] for step in steps[1:]] == sorted(step["value"] for step in steps[1:])
    for one in (panel, *panel["targets"]):
        assert one["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        assert 'job=~"$job",instance=~"$instance"' in target["expr"]
        grouped = {label for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(", ")}
        assert promql.legend_labels(target["legendFormat"]) <= grouped


def test_an_alert_says_what_it_means_and_what_to_do():
    pages = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    for alert in promql.alerts():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["for"]
        said = alert["annotations"]["summary"] + alert["annotations"]["description"]
        for page in re.findall(r"docs/([a-z-]+\.md)", said):
            assert page in pages


def test_every_alert_is_tested_silent_and_loud():
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    expected = [(one["alertname"], bool(one.get("exp_alerts"))) for test in tests for one in test["alert_rule_test"]]
    for alert in promql.alerts():
        assert {loud for name, loud in expected if name == alert["alert"]} == {True, False}


@promtool
@pytest.mark.parametrize("words", [("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")])
def test_prometheus_takes_the_rules_and_they_fire_when_they_should(words):
    done = subprocess.run(["promtool", *words], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_takes_its_configuration():
    command = ["promtool", "check", "config", "prometheus.yml"]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_profile_of_compose_scrapes_the_server_and_shows_the_dashboards():
    services = COMPOSE["services"]
    assert {name for name, one in services.items() if one.get("profiles") == ["monitoring"]} == {
        "prometheus",
        "grafana",
    }
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert config["rule_files"] == ["rules.yml"]
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    servers = [one for one in services.values() if name in str(one.get("networks"))]
    assert [f"{port}:{port}" in server["ports"] for server in servers] == [True, True]  # with a GPU, and without
    (down,) = (alert for alert in promql.alerts() if alert["expr"].startswith("up"))
    assert re.fullmatch(re.findall(r'job=~"([^"]+)"', down["expr"])[0], job["job_name"])
    (source,) = yaml.safe_load((LAUNCH / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((LAUNCH / "grafana" / "provisioning" / "dashboards" / "f2l-vllm.yaml").read_text())[
        "providers"
    ]
    mounts = dict(volume.removesuffix(":ro").rsplit(":", 1)[::-1] for volume in services["grafana"]["volumes"])
    folder = LAUNCH / mounts[provider["options"]["path"]]
    assert {path.stem for path in folder.glob("*.json")} == {*promql.DASHBOARDS}
