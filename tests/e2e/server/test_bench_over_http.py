"""`f2l-vllm bench` at a server that runs already."""

import json

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app


def test_the_highest_rate_of_a_server_is_found_and_nothing_is_left_there(server, tmp_path):
    before = {file.id for file in server.client.files.list()}
    target, table = tmp_path / "ramp.json", tmp_path / "ramp.md"
    quick = ["videos=2", "frames=2", "resolution=64", "requests=12", "output_tokens=2", "rate=4", "precision=1"]
    words = ["bench", "ramp", "--base-url", f"{server.url}/v1", "--json", str(target), "--markdown", str(table)]
    words += [word for one in quick for word in ("--set", one)]
    done = CliRunner().invoke(app, [*words, "--set", "slo={ttft: 60000, e2el: 60000}"])
    assert done.exit_code == 0, done.output
    result = json.loads(target.read_text())
    assert [row["n"] for row in result["rows"]] == [12] * len(result["rows"])
    assert [row["share"] for row in result["rows"]] == [1] * len(result["rows"])  # a minute is enough
    bad = min(row["rate"] for row in result["rows"] if not row["is_good"])  # which the server cannot keep up with
    assert bad / 2 <= result["highest"]["rate"] < bad
    assert result["highest"]["share_ci95"][0] > 0.7
    assert "questions a second at least 99% of the answers are good" in table.read_text()
    assert {file.id for file in server.client.files.list()} == before
    words[words.index(str(target))] = str(tmp_path / "other.json")
    strict = CliRunner().invoke(app, [*words, "--overwrite", "--set", "lowest=3", "--set", "slo={e2el: 0.001}"])
    assert "At no rate" in strict.output


SUITES = {
    "latency": {"arms": ["adapter", "adapter-cold", "frames", "frames-cached", "text"], "frames": [2, 64]},
    "amortise": {"arms": ["adapter", "frames"], "frames": 2, "questions_per_video": 3, "frames_asked": 2},
    "throughput": {"arms": ["adapter", "frames", "text"], "frames": 2, "videos": 2, "requests": 4, "concurrency": 2},
}


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_asks_the_server_as_it_is_and_leaves_nothing_there(suite, server, tmp_path):
    before = {file.id for file in server.client.files.list()}
    target, table = tmp_path / "result.json", tmp_path / "result.md"
    keys = {**SUITES[suite], "resolution": 64, "output_tokens": 2, "rounds": 1}
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    words += ["--base-url", server.url, "--json", str(target), "--markdown", str(table)]
    done = CliRunner().invoke(app, ["bench", suite, *words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    result = json.loads(target.read_text())
    arms = [arm for arm in SUITES[suite]["arms"] if arm != "frames-cached"]
    assert sorted({row["arm"] for row in result["rows"]}) == sorted(arms)
    assert result["configuration"]["model"] == result["servers"]["model"] == "base"
    assert result["servers"]["enable_prefix_caching"] in ("True", "False")
    assert f"A server at {server.url}: f2l-vllm " in table.read_text()
    assert "Asked from " in table.read_text()
    assert {file.id for file in server.client.files.list()} == before
    if suite == "latency":
        assert "left out: frames-cached, whose" in done.output
        assert "left out: 64 frames, above count_above=32" in done.output
        rows = {row["arm"]: row for row in result["rows"]}
        assert rows["text"]["state_bytes"] == 0 < rows["frames"]["state_bytes"] < rows["adapter"]["state_bytes"]
        assert rows["text"]["prompt_tokens"] <= rows["adapter"]["prompt_tokens"] < rows["frames"]["prompt_tokens"]
