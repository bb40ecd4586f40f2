"""`ask` says before it answers what cannot be answered, and takes a server's address as people write it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm import models
from f2l_vllm.cli.main import app
from f2l_vllm.cli.options import api_url, video_file
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.video.probe import probe


def ask(*words: object) -> str:
    done = CliRunner().invoke(app, ["ask", *map(str, words)], env={"COLUMNS": "400"})
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


@pytest.fixture
def video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the video was read")

    monkeypatch.setattr(Internalizer, "internalize", read)
    (tmp_path / "video.mp4").touch()
    return tmp_path / "video.mp4"


def test_more_than_the_model_reads_is_refused_before_the_video_is_read(video: Path) -> None:
    assert "reads at most 2048 tokens" in ask(video, "word " * 5000)
    assert "an answer of up to 2048" in ask(video, "What happens?", "--max-tokens", 2048)


@pytest.mark.parametrize("url", [(), ("--url", "http://127.0.0.1:1")])
def test_an_empty_question_is_refused(video: Path, url: tuple[str, ...]) -> None:
    assert "the question is empty" in ask(video, " \n", *url)


def test_a_server_is_named_with_or_without_the_version_of_its_api() -> None:
    for url in ("http://a:8000", "http://a:8000/", "http://a:8000/v1", "http://a:8000/v1/"):
        assert api_url(url).rstrip("/") == "http://a:8000/v1"
    assert api_url("https://a/behind/a/proxy/v1") == "https://a/behind/a/proxy/v1"


def test_the_sample_is_a_video_that_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert video_file("sample") == models.SAMPLE_VIDEO
    assert models.SAMPLE_VIDEO.stat().st_size < 50_000
    assert probe(models.SAMPLE_VIDEO).duration_s == pytest.approx(8)
    Path("sample").touch()
    assert video_file("sample") == Path("sample")


def test_a_video_that_is_not_there_is_refused() -> None:
    assert "there is no file 'nothing.mp4'" in ask("nothing.mp4", "What happens?")
