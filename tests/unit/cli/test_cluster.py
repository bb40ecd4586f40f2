"""`f2l-vllm cluster` where no cluster runs. `tests/e2e/cluster` starts one."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.cluster.local import Node, environment
from f2l_vllm.lifeline import end_session


def said(*words: str) -> str:
    """What the command line said on its way to exit code 2, in one line."""
    found = CliRunner().invoke(app, ["cluster", *words])
    assert (found.exit_code, len(found.stderr.splitlines())) == (2, 1)
    return found.stderr


@pytest.mark.parametrize("command", ["status", "down"])
def test_what_does_not_run_cannot_be_shown_or_stopped(command, tmp_path):
    text = said(command, "--home", str(tmp_path))
    assert text.startswith(f"f2l-vllm cluster {command}: no cluster of {tmp_path} runs")
    assert "f2l-vllm cluster up" in text


def test_a_node_is_found_while_it_runs(tmp_path):
    folder = tmp_path / "ray"
    program = [sys.executable, "-c", "print(flush=True); input()", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(program, **pipes, start_new_session=True)
    assert process.stdout.read(1)  # the kernel knows its command line by now
    node = Node(process.pid, "127.0.0.1:1", str(folder))
    (tmp_path / "cluster.json").write_text(json.dumps({**vars(node)}))
    assert Node.find(tmp_path) == node
    (tmp_path / "cluster.json").write_text(json.dumps({**vars(node), "pid": os.getpid()}))
    assert Node.find(tmp_path) is None  # its number is another process's by now
    (tmp_path / "cluster.json").write_text(json.dumps({**vars(node)}))
    folder.mkdir()
    node.stop(tmp_path)
    assert process.wait(10) == -9
    assert Node.find(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    end_session(process.pid)  # nobody is left, which is no error


def test_one_machines_catalog_and_store_are_in_its_folder_unless_they_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("F2L_DATABASE_URL", raising=False)
    monkeypatch.setenv("F2L_STORE", "s3://bucket")
    found = environment(tmp_path / "home", "127.0.0.1")
    assert found["F2L_DATABASE_URL"] == f"sqlite:///{tmp_path}/home/catalog.sqlite3"
    assert found["F2L_STORE"] == "s3://bucket"
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert environment(tmp_path / "home", "0.0.0.0")["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
