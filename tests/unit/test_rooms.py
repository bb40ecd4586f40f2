"""What a room loads when it is imported."""

import re
import subprocess
import sys

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
