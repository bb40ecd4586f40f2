"""The paper's figures are data that the commands they name can read."""

import json

import pytest
import typer
from typer.testing import CliRunner

from f2l_vllm.bench import suite
from f2l_vllm.cli.evaluation_extras import Extras
from f2l_vllm.cli.main import app
from f2l_vllm.cli.paper_figures import arguments
from f2l_vllm.evaluation.setup import Setup
from f2l_vllm.recipes.paper.recipe import load, names

COMMANDS = typer.main.get_command(app).commands


def run(*words):
    found = CliRunner().invoke(app, ["paper", *map(str, words)], catch_exceptions=False)
    return found.exit_code, " ".join(found.output.split())


def parsed(recipe, *, small):
    """What the recipe's command would be given."""
    first, *rest = recipe.command.split()
    words = arguments(COMMANDS[first], recipe.settings(small=small, changes={}))
    return COMMANDS[first].make_context(first, [*rest, *words]).params


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", names())
def test_a_figures_options_are_those_of_its_command(name, small):
    recipe = load(name)
    given = parsed(recipe, small=small)
    if recipe.command.startswith("bench "):
        lists = {key: given[key] for key in ("arms", "frames", "resolution")}
        chosen = suite.load(given["suite"], suite.parse_changes(given["set_"], lists, {"rounds": given["rounds"]}))
        assert list(chosen.arms) == recipe.settings(small=small, changes={})["arms"]
    elif recipe.command == "eval":
        setup = Setup(arms=tuple(given["arms"].split(",")), through=given["through"])
        sweep = given["sweep_frames"], given["sweep_resolutions"]
        assert Extras.of(given["sweep"], *sweep, given["diagnostics"], given["efficiency"], None, None, setup)


def test_the_papers_settings_are_in_the_recipes():
    grid = load("stability").options
    assert (grid["sweep_frames"][0], grid["sweep_frames"][-1]) == (12, 1024)
    assert (grid["sweep_resolutions"][0], grid["sweep_resolutions"][-1]) == (384, 1024)
    assert load("two-chunks").options["chunks"] == [1, 2]
    assert load("chunks").options["chunks"][-1] == 15


def test_every_figure_is_listed_with_its_command_and_what_the_paper_found():
    code, said = run("figures")
    assert code == 0
    for name in names():
        recipe = load(name)
        assert f"{name}: {recipe.measures} by: f2l-vllm {recipe.command} --" in said
        assert recipe.paper in said


def test_keys_are_replaced_and_those_of_a_suite_go_through_its_set():
    changes = {"rounds": 2, "count-above": 16, "arms": None}
    words = arguments(COMMANDS["bench"], load("first-token").settings(small=True, changes=changes))
    frames = ["--frames", "8,1024", "--resolution", "64"]
    assert words == [*frames, "--set", "count_above=16", "--rounds", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["best"], "no figure 'best': give one of amortised"),
        (["two-chunks", "--set", "size=3"], "'eval' has no option --size: it has"),
        (["two-chunks", "--set", "chunks"], "--set takes a key and its value"),
        (["two-chunks", "--set", "chunks=2,4"], "numbers of chunks are different ones, the first of them 1"),
        (["first-token", "--set", "size=3"], "the suite latency has no key 'size'"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, tmp_path):
    code, said = run("figure", *words, "-o", tmp_path / "figure")
    assert code == 2
    assert message in said


def test_a_result_is_replaced_only_on_request(tmp_path):
    (tmp_path / "two-chunks.json").write_text(json.dumps({}))
    code, said = run("figure", "two-chunks", "-o", tmp_path)
    assert code == 2
    assert "two-chunks.json is there already" in said
    assert "arXiv 2606.04351" in (tmp_path / "paper.md").read_text()
