"""What a room loads when it is imported."""

import ast
import re
import subprocess
import sys

from f2l_vllm.base_models.registry import FAMILIES
from tests.support import ROOT

HEAVY = {"torch", "transformers", "vllm", "ray", "fastapi"}
LIGHT = [
    "f2l_vllm.store.cached_store",
    "f2l_vllm.catalog.catalog",
    "f2l_vllm.cluster.policy",
    "f2l_vllm.base_models.registry",
    "f2l_vllm.hypernetwork.config_file",
    "f2l_vllm.settings",
    "f2l_vllm.logs",
]


def test_what_is_asked_before_anything_is_loaded_loads_nothing_heavy():
    assert {module: HEAVY & set(loaded) for module, loaded in loaded_by(*LIGHT).items()} == {
        module: set() for module in LIGHT
    }


def test_the_pools_process_leaves_the_models_to_its_workers():
    (loaded,) = loaded_by("f2l_vllm.pool.pool").values()
    assert "ray" in loaded
    assert {"torch", "transformers"}.isdisjoint(loaded)


def loaded_by(*modules):
    """What there is once each of these has been imported, one after the other."""
    program = "import sys\n" + "".join(f"import {module}; print(*sys.modules)\n" for module in modules)
    lines = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = dict(zip(modules, map(str.split, lines.splitlines()), strict=True))
    assert all(module in found for module, found in loaded.items())
    return loaded


def test_ray_serve_is_known_in_the_cluster_alone():
    package = ROOT / "f2l_vllm"
    known = [path for path in package.rglob("*.py") if re.search(r"ray\.serve|ray import serve", path.read_text())]
    assert known
    assert {path.relative_to(package).parts[0] for path in known} == {"cluster"}


def test_base_models_are_named_in_their_own_modules_and_in_the_shipped_models_recipe_alone():
    package = ROOT / "f2l_vllm"
    own = [package / "base_models", package / "engine" / "base_models", package / "recipes" / "f2l_tiny"]
    modules = [path for path in package.rglob("*.py") if not any(path.is_relative_to(folder) for folder in own)]
    assert [path for path in modules if names_a_family(path.read_text())] == []
    assert names_a_family((own[0] / "smolvlm.py").read_text())


def names_a_family(source):
    """Whether code does, docstrings and comments apart."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return any(name in ast.unparse(tree).lower() for name in FAMILIES)
