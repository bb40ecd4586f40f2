"""`f2l-vllm push` and `pull` as a user runs them, with the hub's real client and a hub on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.hypernetwork.locate import locate
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.server_process import free_port
from f2l_vllm.store.address import fingerprint
from tests.support import ROOT
from tests.support.hub import READER, WRITER, Hub, running_hub
from tests.unit.evaluation.test_report import result

RELEASED = ROOT / "tests" / "unit" / "hypernetwork" / "golden" / "hypernetwork.pt"
FILES = ("config.json", "model.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a user who may write to the repositories of `owner`."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        files = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield running


@pytest.fixture
def weights(hypernetwork_model: Path) -> Path:
    return hypernetwork_model / "hypernetwork"


def call(*words: object, code: int = 0) -> str:
    """What `f2l-vllm …` says, in one line."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_what_is_pulled_is_what_was_pushed(hub: Hub, weights: Path, tmp_path: Path) -> None:
    assert f"{hub.url}/owner/mine/commit/" in call("push", weights, "owner/mine")
    assert f"commit {hub.repositories['owner/mine'].branches['main']}" in call(
        "pull", "owner/mine", "-o", tmp_path / "pulled"
    )
    for name in FILES:
        assert (tmp_path / "pulled" / name).read_bytes() == (weights / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "pulled").iterdir()) == ["README.md", *FILES]
    assert ModelCard.load(tmp_path / "pulled" / "README.md").data.library_name == "f2l-vllm"


def test_the_card_tells_of_the_run_and_its_evaluation_and_of_no_path(hub: Hub, weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "hypernetwork").mkdir(parents=True)
    for name in FILES:
        (run / "hypernetwork" / name).write_bytes((weights / name).read_bytes())
    report = {"seed": 0, "processes": 2, "steps": 40, "first_loss": 2.5, "loss": 1.25, "videos": 7}
    report |= {"options": {"learning_rate": 1e-4, "frames": [8, 12], "kl": 0.0}, "left_out": {"/home/me/a.mp4": "no"}}
    report |= {"validation_loss": {"before": 2.4, "after": 1.5}, "best_step": 30}
    (run / "training.json").write_text(json.dumps(report))
    scores = result(skipped=[{"video": "/home/me/b.mp4", "reason": "no", "arm": None}])
    scores["configuration"]["hypernetwork_revision"] = fingerprint(weights)
    (tmp_path / "eval.json").write_text(json.dumps(scores))
    given = ["--evaluation", tmp_path / "eval.json", "--base-model", "maker/base", "--license", "apache-2.0"]
    call("push", run, "owner/mine", *given)
    files = hub.repositories["owner/mine"].files("main")[1]
    assert sorted(files) == ["README.md", *FILES]
    card = ModelCard(files["README.md"].decode())
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("maker/base", "apache-2.0", "f2l-vllm")
    assert {"f2l-vllm", "lora"} <= set(data.tags)
    assert data.model_name == "mine"
    found = {(one.dataset_name, one.dataset_config): one.metric_value for one in data.eval_results}
    assert found["world, held-out", "mean over types"] == pytest.approx(0.9)
    assert {one.metric_type for one in data.eval_results} == {"exact_match"}
    for line in ("| steps | 40 |", "| last loss, smoothed | 1.25 |", "| videos | 7 |", "| `frames` | 8, 12 |"):
        assert line in card.text
    assert "--hypernetwork owner/mine" in card.text
    assert "| world, held-out | mean over types | 20 |" in card.text
    assert "/home/me" not in card.content


def test_an_evaluation_of_another_hypernetwork_is_not_published(hub: Hub, weights: Path, tmp_path: Path) -> None:
    scores = result()
    scores["configuration"]["hypernetwork_revision"] = "0" * 16
    (tmp_path / "eval.json").write_text(json.dumps(scores))
    said = call("push", weights, "owner/mine", "--evaluation", tmp_path / "eval.json", code=2)
    assert "is the evaluation of another hypernetwork" in said
    (tmp_path / "eval.json").write_text('{"accuracy": 1}')
    said = call("push", weights, "owner/mine", "--evaluation", tmp_path / "eval.json", code=2)
    assert "give the JSON that this version of 'f2l-vllm eval --json' writes" in said
    assert hub.repositories == {}


def test_a_licence_and_a_base_model_are_only_stated_where_they_are_known(hub: Hub, weights: Path) -> None:
    assert "The card names no base model" in call("push", weights, "owner/mine")
    data = ModelCard(hub.repositories["owner/mine"].files("main")[1]["README.md"].decode()).data
    assert data.license is None
    assert data.base_model is None
    assert data.eval_results is None


def test_a_branch_is_made_and_pulled_by_name(hub: Hub, weights: Path, tmp_path: Path) -> None:
    call("push", weights, "owner/mine", "--revision", "second")
    assert hub.repositories["owner/mine"].files("main")[1] == {}
    assert "neither config.json with" in call("pull", "owner/mine", "-o", tmp_path / "a", code=2)
    call("pull", "owner/mine", "-o", tmp_path / "a", "--revision", "second")
    said = call("pull", "owner/mine", "-o", tmp_path / "b", "--revision", "third", code=2)
    assert "owner/mine has no revision 'third'" in said


def test_a_private_repository_needs_a_token_and_a_public_one_is_not_taken_for_private(
    hub: Hub, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("push", weights, "owner/mine", "--private")
    assert hub.repositories["owner/mine"].private
    call("push", weights, "owner/open")
    assert "exists and is public" in call("push", weights, "owner/open", "--private", code=2)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    said = call("pull", "owner/mine", "-o", tmp_path / "out", code=2)
    assert "no repository owner/mine at" in said
    assert "'hf auth login', or give --token or HF_TOKEN" in said
    assert not (tmp_path / "out").exists()
    call("pull", "owner/mine", "-o", tmp_path / "out", "--token", READER)


@pytest.mark.parametrize(("token", "said"), [(READER, "You don't have the rights"), ("wrong", "Invalid username")])
def test_whoever_may_not_write_is_told_so(hub: Hub, weights: Path, token: str, said: str) -> None:
    found = call("push", weights, "owner/mine", "--token", token, code=2)
    assert "does not let you write owner/mine" in found
    assert said in found


@pytest.mark.parametrize("command", ["push", "pull"])
def test_without_a_hub_it_is_said_in_a_sentence(
    hub: Hub, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    words = ["push", weights, "owner/mine"] if command == "push" else ["pull", "owner/mine", "-o", tmp_path / "out"]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert "check the network, or HF_ENDPOINT" in call(*words, code=2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT", None)  # it reads the variable when it is made
    assert "HF_HUB_OFFLINE is set" in call(*words, code=2)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([], "holds no hypernetwork (config.json and model.safetensors missing)"),
        (["config.json"], "holds no hypernetwork (model.safetensors missing)"),
        ([".run/hypernetwork.ckpt"], "holds a run that is not finished"),
        (list(FILES), "cannot be read"),
    ],
)
def test_a_folder_without_a_hypernetwork_is_not_pushed(hub: Hub, tmp_path: Path, made: list[str], said: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in made:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{")
    assert said in call("push", folder, "owner/mine", code=2)
    assert hub.repositories == {}


def test_a_base_model_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.put("maker/base", {"config.json": b'{"model_type": "smolvlm"}', "model.safetensors": b"0" * 1000})
    assert "not a hypernetwork" in call("pull", "maker/base", "-o", tmp_path / "out", code=2)
    assert not [line for line in hub.asked if line.endswith("model.safetensors")]


def test_damaged_weights_and_a_broken_download_leave_no_folder(hub: Hub, weights: Path, tmp_path: Path) -> None:
    content = {name: (weights / name).read_bytes() for name in FILES}
    hub.put("owner/cut", {**content, "model.safetensors": content["model.safetensors"][:1000]})
    assert "cannot be read" in call("pull", "owner/cut", "-o", tmp_path / "cut", code=2)
    hub.put("owner/mine", content)
    hub.cut = 1000
    call("pull", "owner/mine", "-o", tmp_path / "cut", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    hub.cut = None
    call("pull", "owner/mine", "-o", tmp_path / "cut")


def test_a_folder_with_files_is_left_alone(hub: Hub, weights: Path, tmp_path: Path) -> None:
    call("push", weights, "owner/mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists already" in call("pull", "owner/mine", "-o", tmp_path / "out", code=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_released_file_is_converted(hub: Hub, tmp_path: Path) -> None:
    hub.put("owner/released", {"README.md": b"", "a-500m.pt": RELEASED.read_bytes(), "a-2.2b.pt": b"damaged"})
    assert "holds several hypernetworks" in call("pull", "owner/released", "-o", tmp_path / "out", code=2)
    call("pull", "owner/released", "-o", tmp_path / "out", "--base-model", "maker/Some-500M")
    assert Hypernetwork.load(tmp_path / "out").revision == Hypernetwork.load(RELEASED).revision
    call("pull", "owner/released/a-500m.pt", "-o", tmp_path / "named")
    assert "holds no file 'b.pt'" in call("pull", "owner/released/b.pt", "-o", tmp_path / "none", code=2)


@pytest.mark.parametrize("name", ["mine", "owner/", "/mine", "owner/my model"])
def test_a_name_that_is_none_of_the_hubs_is_refused(hub: Hub, weights: Path, tmp_path: Path, name: str) -> None:
    assert "write OWNER/NAME" in call("push", weights, name, code=2)
    assert "write OWNER/NAME" in call("pull", name, "-o", tmp_path / "out", code=2)
    assert hub.asked == []


def test_a_server_takes_what_was_pushed_by_its_name(hub: Hub, weights: Path, tmp_path: Path) -> None:
    call("push", weights, "owner/mine")
    words = ["serve", str(weights.parent), "--hypernetwork", "owner/mine", "--dry-run"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "f2l_vllm.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "models--owner--mine/snapshots/" in done.stdout
    with pytest.raises(ValueError, match=r"^No file or directory 'owner/other' here.*404") as refused:
        locate("owner/other")
    assert "\n" not in str(refused.value)
