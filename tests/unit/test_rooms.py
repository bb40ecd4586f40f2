"""What a room loads when it is imported."""

import re
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("module", LIGHT)
def test_what_is_asked_before_anything_is_loaded_loads_nothing_heavy(module):
    assert HEAVY.isdisjoint(loaded_by(module))


def test_the_pools_process_leaves_the_models_to_its_workers():
    loaded = loaded_by("f2l_vllm.pool.pool")
    assert "ray" in loaded
    assert {"torch", "transformers"}.isdisjoint(loaded)


def loaded_by(module):
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    return loaded


def test_ray_serve_is_known_in_the_cluster_alone():
    package = ROOT / "f2l_vllm"
    known = [path for path in package.rglob("*.py") if re.search(r"ray\.serve|ray import serve", path.read_text())]
    assert known
    assert {path.relative_to(package).parts[0] for path in known} == {"cluster"}
