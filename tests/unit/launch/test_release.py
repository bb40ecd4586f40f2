"""`make release` refuses what must not be published, before it builds anything."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with the release's command, the version, and a changelog that has it."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/release", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{VERSION}] - 2026-12-01\n- All of it.\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(tree: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tree, check=True)


def commit(tree: Path) -> None:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "a version")


def refused(tree: Path) -> str:
    command = ["env", f"PYTHON={sys.executable}", "bash", ".ci/release"]
    ran = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert ran.returncode == 1
    assert not (tree / "build").exists()
    assert not (tree / "dist").exists()
    return ran.stderr


def test_a_tree_with_changes_is_refused(tree):
    (tree / "new.txt").write_text("not committed")
    assert "the tree has changes: commit or stash" in refused(tree)


def test_a_version_without_its_changes_is_refused(tree):
    changelog = tree / "CHANGELOG.md"
    changelog.write_text(re.sub(r"## \[.*\].*", "## [Unreleased]", changelog.read_text()))
    commit(tree)
    assert f"no section [{VERSION}]" in refused(tree)
