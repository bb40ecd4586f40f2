"""The versions of vLLM that this package runs with are the same wherever they are named."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from f2l_vllm import vllm_versions
from f2l_vllm.engine import flags
from tests.support import ROOT


def test_pip_installs_the_supported_versions_alone():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (vllm,) = (one for one in map(Requirement, listed) if one.name == "vllm")
    first, *_, last = vllm_versions.TORCH
    assert vllm.specifier == SpecifierSet(f">={first},<0.{int(last.removeprefix('0.')) + 1}")


def test_the_installed_vllm_pins_the_torch_that_make_installs():
    found = vllm_versions.installed()
    (torch,) = (one for one in map(Requirement, requires("vllm")) if one.name == "torch")
    assert str(torch.specifier) == f"=={vllm_versions.TORCH[found]}"
    asked = [sys.executable, ROOT / "f2l_vllm" / "vllm_versions.py", version("vllm")]
    assert subprocess.check_output(asked, text=True).strip() == vllm_versions.TORCH[found]


def test_every_supported_version_has_its_flags_and_its_row_in_the_docs():
    tables = {path.stem.removeprefix("flags-") for path in flags.table().parent.glob("flags-*.json")}
    page = (ROOT / "docs" / "vllm-versions.md").read_text()
    assert tables == set(re.findall(r"^\| (0\.\d+) \|", page, re.MULTILINE)) == set(vllm_versions.TORCH)


def test_another_version_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(vllm_versions, "version", lambda _package: "0.99.1")
    vllm_versions.installed.cache_clear()
    with pytest.raises(ValueError, match=r"vLLM 0\.99\.1 is installed, and f2l-vllm runs with .*pip install 'vllm=="):
        vllm_versions.installed()
    vllm_versions.installed.cache_clear()
