"""A preset is what the documentation says, field by field, and gives way to the command line."""

import inspect
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.cli.training import train
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.train.data.manifest import write_manifest
from f2l_vllm.train.presets import PRESETS, preset
from tests.support import ROOT
from tests.support.training import filmed_examples

SMALL = "--model f2l-tiny --rank 4 --latent-size 32 --blocks 1 --longest-edge 32 --frames 2 --loader-workers 0"


def documented(name: str) -> dict[str, str]:
    """Option -> value, of the column of a preset in the documentation's table."""
    text = (ROOT / "docs" / "training.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head = next(row for row in rows if f"`{name}`" in row)
    column = head.index(f"`{name}`")
    cells = {row[0]: row[column].strip("`") for row in rows if len(row) == len(head) and row[0].startswith("`--")}
    return {re.sub("[`-]", "", option).strip(): value for option, value in cells.items() if value}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_documented_field_by_field_and_names_options_that_there_are(name):
    values = {option.replace("_", ""): f"{value}" for option, value in PRESETS[name].items()}
    assert documented(name) == values
    assert set(PRESETS[name]) <= set(inspect.signature(train).parameters)


def test_the_command_line_comes_before_the_preset(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.jsonl", filmed_examples(tmp_path)[:3])
    words = f"--preset paper --micro-batch 1 --accumulate 2 --steps 1 {SMALL}".split(" ")
    output = tmp_path / "run"
    done = CliRunner().invoke(app, ["train", str(output), "--manifest", str(tmp_path / "manifest.jsonl"), *words])
    assert done.exit_code == 0, done.output
    report = json.loads((output / "training.json").read_text())
    options = report["options"]
    assert (report["seed"], options["kl"], options["weigh"], options["precision"]) == (42, 0.05, "answers", "bf16")
    assert (options["videos"], options["accumulate"], options["steps"], options["frames"]) == (2, 2, 1, [2])
    assert options["validate_every"] is None, "there is nothing to validate with"
    config = Hypernetwork.load(output / "hypernetwork").config
    assert (config.rank, config.num_latents, config.num_self_attn_per_block) == (4, 8, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--preset papers", "no preset 'papers'; choose from paper,"),
        ("--preset paper --videos 2 --micro-batch 1", "give one of them"),
        ("--preset paper --validate-every 5", "--validate-every needs --validation"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, words: str, told: str) -> None:
    line = ["train", str(tmp_path / "run"), "--manifest", str(tmp_path / "none.jsonl"), *words.split(" ")]
    done = CliRunner().invoke(app, line, env={"COLUMNS": "400"})
    assert done.exit_code == 2
    assert told in done.output


def test_there_is_no_preset_of_another_name():
    with pytest.raises(ValueError, match="choose from paper, paper-self-distillation, composable"):
        preset("video")
