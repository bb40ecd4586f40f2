"""What can be known without loading a model is said before anything is loaded, in one sentence."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from f2l_vllm import models
from f2l_vllm.cli import checks, gpus
from f2l_vllm.cli.main import app
from f2l_vllm.cli.serve import plan
from f2l_vllm.engine import flags
from f2l_vllm.engine.defaults import EngineLimits, check_limits
from f2l_vllm.hypernetwork.ranks import RANKS, advice, most_chunks, smallest_rank
from f2l_vllm.pool.lane import _without_paths
from f2l_vllm.settings import SERVER_LOCK, Settings


def said(*arguments: object, code: int = 2) -> str:
    """What a command prints; one line where it refuses."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    if code == 2:
        assert result.output.startswith("f2l-vllm "), result.output
        assert len(result.output.splitlines()) == 1, result.output
    return result.output


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "find", gpus.Gpus)
    monkeypatch.setattr("f2l_vllm.cli.doctor._device", lambda: ("no GPU", "1 GiB", None))  # loads vLLM
    monkeypatch.setenv("F2L_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max-frame", "8"], "did you mean --max-frames?"),
        (["--gpu-memory-utilisation", "0.3"], "did you mean --gpu-memory-utilization?"),
        (["--max-lora-rank", "40"], "--max-lora-rank 40: give one of 1, 8, 16, 32"),
        (["--max-model-len", "many"], "--max-model-len many: no whole number"),
        (["--max-model-len", "9999999"], "the model was made for"),
        (
            ["--gpu-memory-utilization", "1.5"],
            "-memory-utilization 1.5: must be at most 1",
        ),
        (["--dtype", "float12"], "--dtype float12: give one of auto, bfloat16"),
        (["--override-generation-config", "{"], "{: no JSON"),
        (["--max-num-seqs"], "expected one argument"),
        (["--port", "99999"], "--port"),
        (["f2l-tiny", "another"], "'another' belongs to no flag"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read"),
        (["--ssl-certfile", "/no/such.pem"], "there is no file /no/such.pem"),
        (["--max-lora-rank", "8"], "the engine has room for 8: start it with --max-lora-rank 16"),
        (["--lora-target-modules", "q_proj"], "adapters change down_proj"),
        (["--max-chunks", "1000"], "lower --max-chunks to 63 or less"),
        (["--max-loras", "8", "--max-cpu-loras", "4"], "--max-cpu-loras 4 must be at least --max-loras"),
        (["--no-enable-lora"], "--no-enable-lora"),
        (["--api-server-count", "2"], "--api-server-count must be 1"),
        (["--tensor-parallel-size", "7"], "attention heads cannot be shared by 7"),
        (["--worker-gpus", "0.3"], "this machine has no GPU"),
        (["--worker-gpus", "1.5"], "give 1"),
        (["--worker-cpus", "0.00001"], "is less than Ray reserves"),
        (["--merge-rate", "1"], "--merge-rate=1"),
        (["--database-url", "mysql://h/n"], "SQLite or PostgreSQL"),
        (["--model", "./nowhere"], "no model at './nowhere'"),
    ],
)
def test_a_flag_that_cannot_work_is_refused_by_a_dry_run_too(flags, sentence):
    assert sentence in said("serve", *flags, "--dry-run")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("F2L_MAX_FRAME", "8", "F2L_MAX_FRAME is no setting of f2l-vllm: did you mean F2L_MAX_FRAMES?"),
        ("F2L_CPU_PLATFROM", "1", "did you mean F2L_CPU_PLATFORM?"),
        ("f2l_hoem", "x", "did you mean F2L_HOME?"),
        ("F2L_MAX_FRAMES", "abc", "F2L_MAX_FRAMES=abc: 'abc' is no whole number"),
        ("F2L_MAX_FRAMES", "0", "must be at least 1"),
        ("F2L_WORKER_CPUS", "inf", "is no finite number"),
        ("F2L_QUEUE_SHARE", "2", "must be at most 1"),
        ("F2L_CPU_PLATFORM", "yes", "is not valid: use one of auto, 0, 1"),
        ("F2L_HYPERNETWORK", "./nothing", "No hypernetwork at './nothing'"),
        ("F2L_QUEUE_LIMIT", "none", "F2L_QUEUE_LIMIT=none"),
        ("F2L_TENANTS", "/no/such/file", "cannot be read"),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1", "unset it"),
        ("VLLM_USE_RUST_FRONTEND", "1", "unset it"),
    ],
)
def test_a_variable_that_cannot_work_is_refused(monkeypatch, name, value, sentence):
    monkeypatch.setenv(name, value)
    assert sentence in said("serve", "--dry-run")


def test_variables_that_exist_are_taken(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"F2L_{name.upper()}", raising=False)
    for name, value in {"F2L_CPU_PLATFORM": "auto", "F2L_CPU_KV_BYTES": "1000000", "f2l_max_frames": "8"}.items():
        monkeypatch.setenv(name, value)
    said("serve", "--dry-run", code=0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["f2l-tiny", "--port", "9000", "--max-loras", "4"],
        ["--port", "9000", "--max_loras=4", "f2l-tiny"],
        ["--max-loras", "4", "f2l-tiny", "--max-frames", "8", "--port=9000"],
        ["--model", "f2l-tiny", "--max-loras", "4", "--port", "9000"],
    ],
)
def test_the_model_may_stand_anywhere(arguments):
    told = said("serve", *arguments, "--dry-run", code=0)
    assert f"serve {models.resolve('f2l-tiny')} " in told
    assert "9000" in told
    assert told.count("--max-loras") + told.count("--max_loras") == 1


def test_keys_are_taken_as_vllm_takes_them():
    assert "--api-key a b" in said("serve", "--api-key", "a", "b", "--dry-run", code=0)
    assert "--api-key a b" in said("serve", "--api-key", "a", "--api-key", "b", "--dry-run", code=0)


def test_help_names_the_first_flags_of_vllm_and_where_the_others_are():
    told = said("serve", "--help", code=0)
    for flag in ("--host", "--port", "--api-key", "--help=all"):
        assert flag in told


def test_a_config_file_counts_as_flags(tmp_path):
    path = tmp_path / "vllm.yaml"
    path.write_text("max-loras: 4\nport: 9000\nenforce-eager: true\n")
    argv = plan("f2l-tiny", {}, ["--config", str(path)]).argv
    assert "--max-loras" not in argv  # our default would win over the file
    path.write_text("max-lorras: 4\n")
    with pytest.raises(ValueError, match="did you mean --max-loras"):
        plan("f2l-tiny", {}, ["--config", str(path)])


def test_vllms_ways_of_writing_flags_are_read():
    words = ["model", "-tp", "2", "-O3", "--max_model_len=25.6k", "--compilation-config.mode", "3", "--enforce-eager"]
    found = flags.read([*words, "--api-key", "a", "b"])
    assert (found.model_tag, found.tensor_parallel_size, found.max_model_len) == ("model", 2, 25600)
    assert found.api_key == ["a", "b"]
    assert found.enforce_eager is True
    with pytest.raises(ValueError, match="--compilation-confg is no flag"):
        flags.read(["--compilation-confg.mode", "3"])


@pytest.mark.parametrize("rank", range(1, 600))
def test_advice_about_ranks_can_be_followed(rank):
    text = advice(rank)
    if rank > RANKS[-1]:
        assert "--max-lora-rank" not in text
        return
    advised = int(text.split("--max-lora-rank ")[1].split()[0])
    assert advised in RANKS
    check_limits(EngineLimits(advised, 2, None), rank=rank, modules=["down_proj"])


@pytest.mark.parametrize("chunk_rank", [1, 4, 16, 20, 100, 256, 257, 600])
def test_as_many_chunks_as_are_advised_fit(chunk_rank):
    most = most_chunks(chunk_rank)
    assert smallest_rank((most + 2) * chunk_rank) is None
    assert most == 0 or smallest_rank((most + 1) * chunk_rank) is not None


@pytest.mark.parametrize(
    ("share", "workers", "found", "fits"),
    [
        (0.3, 1, 0, False),
        (0.3, 3, 1, True),
        (0.3, 4, 1, False),
        (0.6, 2, 1, False),
        (0.6, 2, 2, True),
        (1, 2, 2, True),
        (2, 1, 1, False),
        (0, 9, 0, True),
        (0.1, 10, 1, True),
        (0.3, 0, 0, True),
    ],
)
def test_workers_that_ray_could_never_place_are_refused(share, workers, found, fits):
    settings = Settings(worker_gpus=share, hypernetwork_workers=workers)
    if fits:
        checks.check_workers(settings, found)
    else:
        with pytest.raises(ValueError, match="hypernetwork worker"):
            checks.check_workers(settings, found)
    checks.check_workers(Settings(worker_gpus=share, ray_address="auto"), 0)  # a cluster may have them, or grow


def test_a_port_that_cannot_be_listened_at_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is taken" in said("serve", "--port", port)
        assert f"port {port} of 127.0.0.1 is taken" in said("demo", "--port", port)
        told = said("doctor", "--port", port, code=1)
        assert f"port {port} of 127.0.0.1 is taken" in " ".join(told.split())
        said("serve", "--port", port, "--dry-run", code=0)
    with pytest.raises(ValueError, match="no address of this machine"):
        checks.check_listening("192.0.2.1", 8000)
    with pytest.raises(ValueError, match="can resolve"):
        checks.check_listening("no-such-host.invalid", 8000)


def test_a_data_folder_that_is_none_or_anothers_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is no folder"):
            checks.check_folder(path)
    home = tmp_path / "data"
    checks.check_folder(home)
    with FileLock(home / SERVER_LOCK), pytest.raises(ValueError, match="another server runs on the data folder"):
        checks.check_folder(home)
    checks.check_folder(home)


def test_a_database_that_does_not_answer_is_said_without_its_password(tmp_path):
    pytest.importorskip("psycopg")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql://user:secret@127.0.0.1:{free.getsockname()[1]}/name"
        with pytest.raises(ValueError, match="cannot be used") as error:
            checks.check_reachable(url)
    assert "secret" not in str(error.value)
    (tmp_path / "no.db").write_text("this is no database at all, is it" * 9)
    with pytest.raises(ValueError, match="not a database"):
        checks.check_reachable(f"sqlite:///{tmp_path / 'no.db'}")


def test_doctor_checks_what_serve_would_run():
    told = " ".join(said("doctor", "--worker-gpus", "0.3", code=1).split())
    assert "this machine has no GPU" in told
    assert "ready to serve" not in told
    assert "no flag of f2l-vllm" in " ".join(said("doctor", "--no-such", code=1).split())


def test_commands_say_what_is_not_there_before_they_load_anything(tmp_path):
    program = (
        "import sys\nfrom f2l_vllm.cli.main import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print(code, *sorted({'torch', 'transformers', 'vllm', 'scipy', 'matplotlib'} & set(sys.modules)))\n"
    )
    commands = [
        ["bench", "nosuch"],
        ["bench", "latency", "--shape", "3b"],
        ["train", tmp_path / "out", "--manifest", "nope.jsonl"],
        ["convert", "nope", "-o", tmp_path / "out"],
        ["demo", "nope.mp4"],
        ["ask", tmp_path, "What?"],
        ["internalize", Path(__file__), "-o", tmp_path / "out", "--model", "./nowhere"],
        ["make-model", tmp_path / "out", "--base", "nope"],
        ["serve", "--max-frame", "8"],
        ["serve", "--worker-gpus", "0.3", "--dry-run"],
        ["plan", "--frames", "0", "--questions", "1", "--videos", "1", "--memory", "1"],
    ]
    loop = f"import sys\nfor arguments in {[list(map(str, c)) for c in commands]!r}:\n    sys.argv[1:] = arguments\n"
    body = "".join(f"    {line}\n" for line in program.splitlines())
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", loop + body], capture_output=True, text=True, timeout=300, env=hidden)
    assert done.stdout.split() == ["2"] * len(commands), done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == len(commands), done.stderr


SHAPES = {
    "500M": ((32, 960, 2560, 15), (12, 768), models.RELEASED_FOR[0]),
    "2.2B": ((24, 2048, 8192, 32), (27, 1152), models.RELEASED_FOR[1]),
}


@pytest.mark.parametrize("size", SHAPES)
def test_a_copy_of_a_released_model_is_recognised_and_its_hypernetwork_named(tmp_path, size):
    text, vision, name = SHAPES[size]
    copy = tmp_path / "my copy"
    copy.mkdir()
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    config = {
        "model_type": "smolvlm",
        "text_config": dict(zip(keys, text, strict=True)),
        "vision_config": dict(zip(keys[:2], vision, strict=True)),
    }
    (copy / "config.json").write_text(json.dumps(config))
    assert models.recognised(str(copy)) == name
    told = said("serve", copy)
    assert name in told
    assert f"f2l-vllm serve '{copy}' --hypernetwork {models.RELEASED_HYPERNETWORKS}" in told
    released = tmp_path / "released"
    released.mkdir()
    for one in SHAPES:
        (released / f"smolvlm2_{one.lower()}.pt").touch()
    assert models.resolve_hypernetwork(str(copy), str(released)).name == f"smolvlm2_{size.lower()}.pt"


def test_a_model_of_another_family_is_refused_with_the_families_there_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "text_config": {}}))
    told = said("serve", tmp_path)
    assert "'qwen2_vl'" in told
    assert "smolvlm" in told
    assert "docs/base-models.md" in told
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smolvlm"}))
    assert "'text_config' is missing" in said("serve", tmp_path)


def test_another_model_is_told_which_hypernetworks_are_released(smolvlm_dir):
    told = said("serve", smolvlm_dir)
    for name in (models.RELEASED_HYPERNETWORKS, *models.RELEASED_FOR):
        assert name in told


def test_reasons_name_no_path():
    error = ValueError("line\nOSError: [Errno 2] No such file: '/home/me/model/config.json'")
    assert _without_paths(error) == "OSError: [Errno 2] No such file: '…'"
