"""What `f2l-vllm workers` refuses and loads, before it starts Ray."""

import subprocess
import sys
from argparse import Namespace

import pytest
from typer.testing import CliRunner

from f2l_vllm import models
from f2l_vllm.cli.main import app
from f2l_vllm.cli.workers import plan
from f2l_vllm.server.inputs import Inputs
from f2l_vllm.store.address import Revisions, fingerprint


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["workers", *words])
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--hypernetwork-workers", "0"], "is for servers: give 1 or more here"),
        (["--max-lora-rank", "8"], "rank"),
        (["--worker-gpus", "1"], "this machine has no GPU"),
        (["--database-url", "mysql://x"], "SQLite or PostgreSQL"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(words, why):
    assert why in refused(*words)


def test_workers_have_the_revision_and_rank_of_a_server_with_the_same_settings(tmp_path):
    workers = plan("f2l-tiny", {"F2L_HOME": str(tmp_path), "F2L_MAX_FRAMES": "6"})
    inputs = Inputs.read("f2l-tiny", {"F2L_MAX_FRAMES": "6"})
    directory = models.resolve("f2l-tiny")
    hypernetwork = models.resolve_hypernetwork("f2l-tiny", None)
    revisions = Revisions(fingerprint(directory), fingerprint(hypernetwork), inputs.settings.reading)
    assert workers.revision == revisions.name("") != plan("f2l-tiny", {}).revision
    assert workers.spec == inputs.workers(Namespace(), tmp_path)


def test_nothing_of_vllm_is_loaded():
    program = """
import sys
from f2l_vllm.cli import workers
workers.plan("f2l-tiny", {})
from f2l_vllm.pool.pool import open_pool
print("vllm" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"
