"""Target answers from a running server: those of the same model in this process."""

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.train.data.manifest import Example, read_manifest, write_manifest
from f2l_vllm.train.data.targets import write_targets
from f2l_vllm.train.data.teacher import LocalTeacher, ServerTeacher, TeacherError
from tests.support.server import Server


@pytest.fixture(scope="module")
def manifest(clips, tmp_path_factory):
    """Whole videos, a span, and two that cannot be used."""
    folder = tmp_path_factory.mktemp("targets")
    broken = folder / "broken.mp4"
    broken.write_bytes(clips[0].read_bytes()[:800])
    examples = [Example(f"{n}", clips[n], "What is shown?", "", "caption", "d", "train") for n in range(3)]
    examples += [
        Example("again", clips[1], "Describe the image.", "", "caption", "d", "train"),
        Example("broken", broken, "What is shown?", "", "caption", "d", "train"),
        Example("late", clips[1], "What is shown?", "", "caption", "d", "train", {"start": 50, "end": 60}),
        Example("span", clips[2], "What is shown?", "", "caption", "d", "train", {"start": 1.0, "end": 3.0}),
    ]
    write_manifest(folder / "m.jsonl", examples)
    return folder / "m.jsonl"


def test_a_server_gives_the_same_targets_as_transformers(server: Server, hypernetwork_model, manifest, tmp_path):
    local = LocalTeacher.load(hypernetwork_model, "base", max_tokens=12)
    expected, _ = write_targets(manifest, tmp_path / "local.jsonl", local)
    output, report = tmp_path / "server.jsonl", tmp_path / "report.jsonl"
    flags = ["-o", str(output), "--base-url", f"{server.url}/v1", "--max-tokens", "12", "--report", str(report)]
    run = CliRunner().invoke(app, ["targets", str(manifest), *flags])
    assert run.exit_code == 0, run.output
    answers = {example.id: example for example in read_manifest(output)}
    assert answers.keys() == {example.id for example in expected} == {"0", "1", "2", "again", "span"}
    for example in expected:
        if example.span is None:  # a span is encoded anew for the server
            # A random model may end in the middle of a character, which only transformers shows.
            assert answers[example.id].target_text.rstrip("\ufffd") == example.target_text.rstrip("\ufffd")
        assert answers[example.id].metadata["teacher"]["model"] == "base"
    assert len({example.target_text for example in expected}) > 2
    assert "left out: 1 x span_outside_video" in run.output
    assert report.read_text().count("\n") == 2


def test_a_server_that_is_not_there_or_lacks_the_model_is_told_at_once(server: Server, manifest, tmp_path):
    with pytest.raises(ValueError, match=r"does not serve other, but \['base'\]"):
        ServerTeacher(f"{server.url}/v1", "none", "other", max_tokens=8)
    flags = ["-o", str(tmp_path / "out.jsonl"), "--base-url", f"{server.url}/v1", "--max-frames", "4"]
    run = CliRunner().invoke(app, ["targets", str(manifest), *flags])
    assert run.exit_code == 2
    assert "media-io-kwargs" in run.output


def test_a_server_that_goes_away_stops_the_run_and_not_the_example(server: Server, manifest, tmp_path, monkeypatch):
    teacher = ServerTeacher(f"{server.url}/v1", "none", max_tokens=8)
    gone = teacher._client.with_options(base_url="http://127.0.0.1:9/v1", max_retries=0)
    monkeypatch.setattr(teacher, "_client", gone)
    with pytest.raises(TeacherError, match="cannot be reached any more"):
        write_targets(manifest, tmp_path / "out.jsonl", teacher)
    assert not (tmp_path / "out.jsonl").exists()
