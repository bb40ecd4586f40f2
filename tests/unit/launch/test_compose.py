"""What `launch/compose.yaml` starts is a command that `f2l-vllm` takes."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import yaml
from vllm import envs

from f2l_vllm.cli import main
from tests.support import ROOT

SERVICES = yaml.safe_load((ROOT / "launch" / "compose.yaml").read_text())["services"]
DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()


def words(device: str) -> list[str]:
    """A service's command, its variables as Compose sets them."""
    command = "\0".join(SERVICES[device]["command"]).replace("${F2L_API_KEY:", "${F2L_API_KEY:-secret:")
    return re.sub(r"\$\{\w+:-(\w[\w./-]*)[^}]*\}", r"\1", command).split("\0")


def test_the_service_without_a_gpu_runs_a_server(tmp_path):
    command = [sys.executable, "-m", main.__name__.removesuffix(".main"), *words("cpu"), "--dry-run"]
    environment = {**os.environ, "F2L_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for word in ("f2l-tiny", "--host", "0.0.0.0", "secret"):
        assert word in ran.stdout


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_each_device_has_a_service_and_a_stage(device):
    service = SERVICES[device]
    assert service["profiles"] == [device]
    assert service["restart"] == "unless-stopped"
    assert service["build"].get("args", {}).get("DEVICE", "gpu") == device
    assert f" AS base-{device}\n" in DOCKERFILE
    assert words(device)[0] == "serve"


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_what_is_compiled_outlives_a_container(device):
    compose = yaml.safe_load((ROOT / "launch" / "compose.yaml").read_text())
    mounts = dict(mount.rsplit(":", 1)[::-1] for mount in compose["services"][device]["volumes"])
    named = dict(word.split("=", 1) for word in re.findall(r"\b(?:VLLM_CACHE_ROOT|TRITON_CACHE_DIR)=\S+", DOCKERFILE))
    assert set(named) == {"VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"}
    for name, folder in named.items():
        volume = mounts["/" + folder.split("/")[1]]
        assert volume in compose["volumes"], name
        assert re.search(rf"install -d -o 1000 .*/{folder.split('/')[1]}\b", DOCKERFILE)  # a new volume takes its owner
    assert "VLLM_CACHE_ROOT" in inspect.getsource(envs)
