"""`f2l-vllm bench ramp` at a server that runs already."""

import json

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
