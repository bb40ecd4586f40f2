"""The site is built without a warning, and its reference has everything that the code has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from f2l_vllm.server.chat.request import QUESTION_ROUTES
from f2l_vllm.settings import Settings
from tests.support import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def words(site: Path, page: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text()))


def test_the_reference_has_every_setting_command_and_route(site: Path) -> None:
    settings, commands, http = (words(site, f"reference/{page}") for page in ("settings", "command-line", "http"))
    assert [name for name in Settings.model_fields if f"F2L_{name.upper()}" not in settings] == []
    for command in ("serve", "ask", "keys add", "manifest world"):
        assert f"$ f2l-vllm {command}" in commands
    openapi = json.loads((site / "reference" / "openapi.json").read_text())
    server = ROOT / "f2l_vllm" / "server"
    sources = [path.read_text() for room in ("videos", "batches") for path in (server / room).glob("*.py")]
    routes = [route for text in sources for route in re.findall(r'^@router\.(\w+)\("(.+?)"\)', text, re.MULTILINE)]
    assert len(routes) >= 10
    routes += [("post", path) for path in sorted(QUESTION_ROUTES)]
    for method, path in routes:
        path = path.replace(":path", "")
        assert method in openapi["paths"][path]
        assert f"{method.upper()} {path}" in http


def test_what_pages_link_to_in_the_repository_is_in_the_site(site: Path) -> None:
    assert "A purple cross moves up" in words(site, "")  # README
    assert (site / "repository" / "benchmarks" / "results" / "plots-sweep" / "first-token.png").is_file()
    assert "class BaseModelSpec" in words(site, "repository/f2l_vllm/base_models/spec.py")
