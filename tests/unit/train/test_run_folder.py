"""A finished run is replaced or extended when that is asked for, and never otherwise."""

import json
import random
import re
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.hypernetwork.weights import write_weights
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.train import folder
from f2l_vllm.train.data.manifest import Example, write_manifest

SHAPE = ("--rank", "4", "--latent-size", "32", "--blocks", "1")


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})
    assert done.exit_code == code, done.output
    return re.sub(r"[│\s]+", " ", done.output)


def content(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("videos")
    examples = []
    for number, scene in enumerate(sample_scenes(3, seed=5)):
        video = write_mp4(scene, home / f"{number}.mp4", size=(64, 48), seconds=2)
        question, answer, kind = phrases.questions(scene, random.Random(0))[0]
        examples.append(Example(str(number), video, question, answer, kind, "world", "train"))
    write_manifest(home / "manifest.jsonl", examples)
    return home / "manifest.jsonl"


def test_a_finished_run_is_refused_extended_and_replaced(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train = ("train", output, "--manifest", manifest, "--videos", 1, "--frames", 2, "--longest-edge", 32)
    told = run(*train, *SHAPE, "--steps", 2)
    assert "hypernetwork: 100%" in told  # without a terminal, too
    first = content(output)
    assert stat.S_IMODE((output / "hypernetwork" / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (output / "training.json").stat().st_mode
    )

    told = run(*train, *SHAPE, "--steps", 2, code=2)
    assert "holds a finished run" in told
    assert "--extend" in told
    assert "--overwrite" in told
    assert "shape from flags" in run(*train, *SHAPE, "--steps", 2, "--extend", code=2)
    assert content(output) == first

    run(*train, "--steps", 3, "--extend")
    report = json.loads((output / "training.json").read_text())
    assert (report["steps"], [before["steps"] for before in report["extends"]]) == (3, [2])
    assert report["extends"][0] == json.loads(first["training.json"])
    stages = [json.loads(line)["stage"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert stages == ["hypernetwork"] * 2 + ["hypernetwork-2"] * 2
    extended = (output / "hypernetwork" / "model.safetensors").read_bytes()
    assert extended != first["hypernetwork/model.safetensors"]
    assert not (output / ".run").exists()

    run(*train, *SHAPE, "--steps", 2, "--overwrite")
    again = content(output)
    assert again["hypernetwork/model.safetensors"] == first["hypernetwork/model.safetensors"]
    assert "extends" not in json.loads(again["training.json"])


def test_what_is_served_is_the_best_and_the_last_lies_beside_it(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train = ("train", output, "--manifest", manifest, "--videos", 1, "--frames", 2, "--longest-edge", 32)
    validated = ("--validation", manifest, "--validate-every", 2)
    diverging = ("--steps", 4, "--learning-rate", 30)  # so the last weights are not the best
    assert "--validate-every needs --validation" in run(*train, *SHAPE, "--validate-every", 2, code=2)
    run(*train, *SHAPE, *diverging, *validated)
    report = json.loads((output / "training.json").read_text())
    losses = {taken["step"]: taken["loss"] for taken in report["validations"]}
    assert list(losses) == [0, 2, 4]
    assert losses[report["best_step"]] == min(losses.values()) < losses[4]
    both = [(output / name / "model.safetensors").read_bytes() for name in (folder.BEST, folder.LAST)]
    assert both[0] != both[1]
    assert (output / folder.BEST / "config.json").read_bytes() == (output / folder.LAST / "config.json").read_bytes()

    run(*train, "--steps", 1, "--extend", *validated)
    extended = json.loads((output / "training.json").read_text())
    assert extended["validations"][0]["loss"] == losses[report["best_step"]], "it goes on from the best"

    run(*train, *SHAPE, "--steps", 4, "--learning-rate", 30, "--overwrite")
    assert (output / folder.BEST / "model.safetensors").read_bytes() == both[1], "validation changes no step"
    assert not (output / folder.LAST).exists()


def test_an_unfinished_run_is_gone_on_with_as_what_it_is(tmp_path: Path) -> None:
    def check(**options: bool) -> None:
        folder.check(tmp_path, ("result",), **{"overwrite": False, "extend": False, **options})

    check()
    with pytest.raises(ValueError, match="no finished run that could be extended"):
        check(extend=True)
    (tmp_path / ".run").mkdir()
    (tmp_path / ".run" / "stage.ckpt").touch()
    (tmp_path / "result").touch()
    check()  # a run that replaces the result, begun and killed
    with pytest.raises(ValueError, match="unfinished run: go on without --extend"):
        check(extend=True)
    (tmp_path / ".run" / folder.START_FOLDER).mkdir()
    check(extend=True)
    with pytest.raises(ValueError, match="unfinished extension: go on with --extend"):
        check()
    check(overwrite=True)
    with pytest.raises(ValueError, match="give one of them"):
        check(overwrite=True, extend=True)


def test_make_model_does_not_train_over_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = run("make-model", tmp_path, code=2)
    assert "holds a finished run (config.json): --overwrite starts anew" in told
    assert content(tmp_path) == {"config.json": b"{}"}


def test_weights_follow_the_umask_as_every_other_file(tmp_path: Path) -> None:
    import torch

    write_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "text").write_text("")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1
