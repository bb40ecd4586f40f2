"""The dashboards and alerts of `launch/` ask for what a running server shows."""

import re

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import ROOT, promql
from tests.support.promql import OF_PROMETHEUS

ELSEWHERE = {"up", "ray_serve_deployment_status"}  # Prometheus's own; of Ray Serve, tests/e2e/cluster/test_serve.py


@pytest.fixture(scope="module")
def shown(server, clips):
    """The samples of /metrics after a question and an error: name -> their labels with their values."""
    video = server.upload(clips[0])
    question = [{"role": "user", "content": "What is shown?"}]
    server.client.chat.completions.create(model=video.id, messages=question, max_tokens=2)
    with pytest.raises(openai.NotFoundError):
        server.client.files.retrieve("file-of-nobody")
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_every_panel_and_alert_finds_its_metrics_labels_and_values(shown):
    missing = []
    for where, text in promql.expressions():
        for one in promql.series(text):
            if one.name in ELSEWHERE:
                continue
            samples = shown.get(one.name, [])
            if not any(one.labels <= {*labels} | OF_PROMETHEUS for labels in samples):
                missing.append((where, one.name, sorted(one.labels)))
            if not any({*one.values} <= {*labels.items()} for labels in samples):
                missing.append((where, one.name, sorted(one.values)))
    assert missing == []


def test_the_consoles_page_of_the_server_finds_its_metrics_labels_and_values(shown):
    text = (ROOT / "f2l_vllm" / "server" / "console" / "static" / "operator.js").read_text()
    asked = re.findall(r'"((?:f2l_|vllm:)\w+)"(?:, (?:\{ (\w+): "(\w+)" \}|"(\w+)"))?', text)
    assert len(asked) > 20
    missing = []
    for name, label, value, by in asked:
        samples = shown.get(name, []) or shown.get(f"{name}_bucket", [])
        wanted, named = {(label, value)} - {("", "")}, {label, by} - {""}
        if not any(wanted <= {*labels.items()} and named <= {*labels} for labels in samples):
            missing.append((name, label, value, by))
    assert missing == []
