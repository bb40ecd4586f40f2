"""The commands and programs that pages show."""

from __future__ import annotations

import re

from tests.support import ROOT

URL = "http://127.0.0.1:8000"  # of the server, on every page


def blocks(page: str, language: str) -> list[str]:
    """What stands in a page's fences of a language, in order; of no language: output."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


def commands(page: str) -> list[str]:
    """A page's commands, one by one, with continued lines as one."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]
