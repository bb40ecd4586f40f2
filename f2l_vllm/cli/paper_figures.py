"""`f2l-vllm paper figures` and `paper figure`: a figure's recipe, run by the command that it names."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from f2l_vllm.bench.suite import parse_changes
from f2l_vllm.files import write_whole
from f2l_vllm.recipes.paper.recipe import Recipe, load, names

_PLACES = {"json": "{}.json", "markdown": "{}.md", "plots": "plots", "work": "work"}


def tell(root: Any) -> None:
    """Print every figure: what it measures, how, and what the paper found."""
    for name in names():
        recipe = load(name)
        command, words = _command(root, recipe)
        typer.echo(f"{name}: {recipe.measures}")
        typer.echo(f"  by: f2l-vllm {shlex.join([command.name, *words, *arguments(command, recipe.options)])}")
        typer.echo(f"  the paper: {recipe.paper} ({recipe.source})")
        if recipe.differs:
            typer.echo(f"  here: {recipe.differs}")


def run(
    root: Any,
    name: str,
    model: str,
    hypernetwork: str | None,
    small: bool,
    pairs: Sequence[str],
    folder: Path,
    overwrite: bool,
) -> None:
    """Run a figure's command; its results, plots and what the paper found go to `folder`.

    Args:
        root: of the whole command line, which has all commands.

    Raises:
        ValueError: no such figure, or an option that its command does not have.
    """
    recipe = load(name)
    command, words = _command(root, recipe)
    ours = {option: str(folder / place.format(name)) for option, place in _PLACES.items()}
    ours = {option: place for option, place in ours.items() if option in _flags(command)}
    settings = recipe.settings(small=small, changes=parse_changes(pairs, {}, {}))
    ours |= {"model": model, **({"hypernetwork": hypernetwork} if hypernetwork else {})}
    words += arguments(command, {**ours, "overwrite": overwrite, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "paper.md", about(name, recipe, [command.name, *words]))
    with command.make_context(command.name, list(words), parent=root) as context:
        command.invoke(context)
    typer.echo(f"The paper: {recipe.paper} ({recipe.source})")
    typer.echo(f"written: {folder}")


def arguments(command: Any, options: Mapping[str, Any]) -> list[str]:
    """A command line's words for these options.

    Args:
        command: of click.
        options: name with underscores -> value; None leaves an option out, a list is joined by comma.

    Raises:
        ValueError: the command has no such option, and no `--set` that takes other keys.
    """
    known = _flags(command)
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if name not in known and "set" not in known:
            raise ValueError(f"'{command.name}' has no option {flag}: it has {', '.join(sorted(known))}")
        if name not in known:
            words += ["--set", f"{name}={json.dumps(value)}"]
        elif known[name].is_flag:
            words += [flag] if value else []
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def about(name: str, recipe: Recipe, words: Sequence[str]) -> str:
    """What was measured, by which command, and what the paper found, as Markdown."""
    lines = [f"# {name}", f"Measured: {recipe.measures}.", f"By: `f2l-vllm {shlex.join(words)}`"]
    lines += [f"The paper: {recipe.paper} ({recipe.source})"]
    return "\n\n".join(lines + ([f"Here: {recipe.differs}"] if recipe.differs else [])) + "\n"


def _command(root: Any, recipe: Recipe) -> tuple[Any, list[str]]:
    """The command of click, and the words that come before its options."""
    first, *rest = recipe.command.split()
    group: Any = root.command
    return group.get_command(root, first), rest


def _flags(command: Any) -> dict[str, Any]:
    """A command's options by their names, with underscores."""
    return {word[2:].replace("-", "_"): one for one in command.params for word in one.opts if word.startswith("--")}
