"""A figure as data: the command that measures it, the paper's settings as its options, and what the paper found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

RECIPES = Path(__file__).parent
Text = Annotated[str, Field(min_length=1)]


class Recipe(BaseModel):
    """One figure.

    Attributes:
        measures: what is measured, and over what.
        paper: what the paper found.
        source: of the paper's settings and of what it found.
        differs: what is otherwise here.
        command: words of a command of `f2l-vllm`.
        options: of that command, without dashes; a list is given by comma, true is a flag. A command with `--set`, as
            `bench`, gets its suite's keys with it.
        small: what replaces options, for the shipped model in under a minute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    measures: Text
    paper: Text
    source: Text
    differs: str = ""
    command: Text
    options: dict[str, Any]
    small: dict[str, Any]

    def settings(self, *, small: bool, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The options in force. Names may be written with underscores or dashes; the last one given counts."""
        found: dict[str, Any] = {}
        for options in (self.options, self.small if small else {}, changes):
            found |= {name.replace("-", "_"): value for name, value in options.items()}
        return found


def names() -> list[str]:
    """The figures."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name: str) -> Recipe:
    """Read a figure's recipe.

    Raises:
        ValueError: no such figure.
    """
    if name not in names():
        raise ValueError(f"no figure {name!r}: give one of {', '.join(names())}")
    path = RECIPES / f"{name}.yaml"
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:  # a mistake in the package, which its tests find
        raise AssertionError(f"{path}: {error}") from error
