"""What was fetched from the hub once serves without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from f2l_vllm.server_process import free_port

COMMIT = "a" * 40


def cached(hub: Path, repository: str, source: Path) -> None:
    """Put a folder into a cache of the hub as a repository's snapshot."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / COMMIT, ignore=shutil.ignore_patterns("hypernetwork"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def unreachable() -> str:
    """The address of a hub that refuses connections."""
    return f"http://127.0.0.1:{free_port()}"


def dry_run(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["serve", "owner/model", "--hypernetwork", "owner/hyper", "--dry-run"]
    environment = {**os.environ, "HF_HOME": str(home), "CUDA_VISIBLE_DEVICES": "", **variables}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "f2l_vllm.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("how", ["told that there is no hub", "a hub that does not answer"])
def test_a_cached_model_and_hypernetwork_serve_without_the_hub(
    how: str, hypernetwork_model: Path, tmp_path: Path, unreachable: str
) -> None:
    variables = {"HF_ENDPOINT": unreachable, **({"HF_HUB_OFFLINE": "1"} if how.startswith("told") else {})}
    cached(tmp_path / "hub", "owner/model", hypernetwork_model)
    missing = dry_run(tmp_path, **variables)
    assert missing.returncode == 2
    assert "'owner/hyper' here, and the Hugging Face repository could not be read" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1, missing.stderr
    cached(tmp_path / "hub", "owner/hyper", hypernetwork_model / "hypernetwork")
    done = dry_run(tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    for repository in ("owner--model", "owner--hyper"):
        assert f"models--{repository}/snapshots/{COMMIT}" in done.stdout
