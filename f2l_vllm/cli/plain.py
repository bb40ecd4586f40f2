"""A user's mistake is reported in one line, `f2l-vllm COMMAND: what and what to do`, for people and logs alike."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

_UsageError: Any = typer.BadParameter.__base__  # typer has its own copy of click, or uses the installed one
_HELP = "NoArgsIsHelpError"  # not an error: its message is the help


class PlainGroup(TyperGroup):
    """The group of all commands; exits with 2, like click, for mistakes in the command line or the environment."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, or say why not."""
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            if type(error).__name__ == _HELP:
                raise
            where: Any = error.ctx or ctx
            names: list[str] = []
            while where is not None and where.parent is not None:
                names.insert(0, str(where.info_name))
                where = where.parent
            nameless = isinstance(error, typer.BadParameter) and error.param is None and error.param_hint is None
            message = error.message if nameless else error.format_message()
            typer.echo(f"{' '.join(['f2l-vllm', *names])}: {message}", err=True)
            raise typer.Exit(2) from error
