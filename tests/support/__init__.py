"""What tests share: servers, videos, checkpoints, databases, disks."""

import inspect
import re
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository


def module_source(name: str) -> str:
    """The text of a module, which is not loaded."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


def source_of(kind: type) -> str:
    """The text of a class of a module, found by its lines. `inspect.getsource` parses the whole file, at which Python
    3.11 fails when the garbage collector runs meanwhile (github.com/python/cpython/issues/106905)."""
    lines = Path(inspect.getfile(kind)).read_text().splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if re.match(rf"class {kind.__name__}\b", line)) + 1
    return "".join(takewhile(lambda line: line[0] in " \n#)", lines[start:]))
