"""`f2l-vllm train` as its user runs it: killed and started again, and shared by processes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from f2l_vllm import models
from f2l_vllm.cli.main import app
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.train.data.manifest import Example, write_manifest
from f2l_vllm.train.loop import LOG_FILE
from f2l_vllm.train.pace import MEASURED
from f2l_vllm.train.trainer import REPORT_FILE
from tests.support.tars import running_site, write_shards
from tests.support.training import filmed_examples, train_command, train_words

TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    return filmed_examples(tmp_path_factory.mktemp("videos"))


def curve(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def is_running(pid: str) -> bool:
    """Neither gone nor a zombie that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_command_goes_on_after_a_kill_as_if_there_had_been_none(examples, tmp_path):
    """The videos are decoded in the process, from files; then by four others, and by one, from tar files of a web
    server. No bit is different."""
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(manifest, examples)
    pattern = write_shards(tmp_path, examples, 2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert CliRunner().invoke(app, train_words(unbroken, manifest)).exit_code == 0
    with running_site(tmp_path) as site:
        shards = f"{site.url}/{pattern}"
        process = subprocess.Popen([*train_command(killed, shards), "--loader-workers", "4"], env=environment)
        log = killed / ".run" / LOG_FILE
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.02)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) >= 4
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(is_running(worker) for worker in workers):
            assert time.monotonic() < deadline, "they end with their trainer"
            time.sleep(0.02)
        assert not (killed / "hypernetwork").exists(), "killed before the end"
        assert CliRunner().invoke(app, [*train_words(killed, shards), "--loader-workers", "1"]).exit_code == 0
    assert curve(killed) == curve(unbroken)
    assert not (killed / ".run").exists()
    for name in ("config.json", "model.safetensors"):
        assert (killed / "hypernetwork" / name).read_bytes() == (unbroken / "hypernetwork" / name).read_bytes()
    trained = Hypernetwork.load(killed / "hypernetwork", dtype=None)
    assert (trained.config.rank, trained.config.max_frames, trained.config.longest_edge) == (4, 4, 48)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}, "as it was trained and validated"


def test_two_processes_learn_what_one_does(examples, tmp_path):
    """All questions but one are about one video, so the processes' parts of a step are of very different lengths. The
    second process alone comes upon the broken video. The base model is in fp32: what bf16 rounds depends on the batch,
    on some CPUs by more than a thousandth of the gradient."""
    model = AutoModelForImageTextToText.from_pretrained(models.resolve("f2l-tiny"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(models.resolve("f2l-tiny")).save_pretrained(tmp_path / "model")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    broken = Example("x", tmp_path / "broken.mp4", "What?", "No.", "caption", "world", "train")
    manifest = tmp_path / "manifest.jsonl"
    uneven = [example for example in examples if example.id.startswith("0-") or example.id == "1-0"]
    write_manifest(manifest, [*uneven, broken])
    steps = f"--steps 1 --videos 2 --questions 20 --model {tmp_path / 'model'}"
    steps += f" --validation {manifest} --validate-every 1"
    assert CliRunner().invoke(app, train_words(tmp_path / "one", manifest, steps)).exit_code == 0
    command = train_command(tmp_path / "two", manifest, *TWO_PROCESSES, steps=steps)
    assert subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert (two["loss"], two["norm"]) == pytest.approx((one["loss"], one["norm"]), rel=1e-3)
    reports = [json.loads((tmp_path / name / REPORT_FILE).read_text()) for name in ("one", "two")]
    for one, two in zip(*(report["validations"] for report in reports), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    left_out = [report["left_out"] for report in reports]
    assert left_out[0] == left_out[1]
    assert ["broken.mp4" in key for key in left_out[1]] == [True]
