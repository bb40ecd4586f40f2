"""A result file that grows: it is rewritten whole after every row, so a run that ends early loses only one cell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from f2l_vllm.bench import record
from f2l_vllm.files import write_whole

Row = dict[str, Any]
Derive = Callable[[list[Row]], dict[str, Any]]
Say = Callable[[str], None]  # told of every measurement as it is made


class ResultsFile:
    """Rows and the conditions of their measurement.

    Args:
        path: of the JSON file.
        suite: name of the suite.
        configuration: everything that was asked for.
        derive: computes further results from the rows.
        resume: keep the rows of a file with the same suite and configuration.

    Raises:
        ValueError: `resume` is set and the file holds something else.
    """

    def __init__(
        self, path: Path, suite: str, configuration: dict[str, Any], derive: Derive, resume: bool = False
    ) -> None:
        configuration = json.loads(json.dumps(configuration))
        self.content: dict[str, Any] = {"suite": suite, **record.header(configuration), "rows": []}
        self._path = path
        self._derive = derive
        if resume and path.exists():
            before = json.loads(path.read_text())
            if (before.get("suite"), before.get("configuration")) != (suite, configuration):
                raise ValueError(f"{path} was measured under another configuration: leave out --resume to replace it")
            self.content = {**before, **self.content, "rows": before["rows"]}
            self.content |= derive(self.rows)

    @property
    def rows(self) -> list[Row]:
        """The rows so far."""
        rows: list[Row] = self.content["rows"]
        return rows

    def note(self, **facts: Any) -> None:
        """Add facts to the file; they are written with its next row."""
        self.content |= facts

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, *rows: Row) -> None:
        """Keep rows, and write the file whole."""
        self.rows.extend(rows)
        self.content |= self._derive(self.rows)
        write_whole(self._path, json.dumps(self.content, indent=1) + "\n")
