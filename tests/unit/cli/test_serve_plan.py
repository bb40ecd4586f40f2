import json

import httpx
import pytest
from typer.testing import CliRunner

from f2l_vllm import models, tracing
from f2l_vllm.cli import gpus
from f2l_vllm.cli.main import app
from f2l_vllm.cli.serve import PLUGINS, plan


def flag(argv, name):
    return argv[argv.index(name) + 1]


def test_the_flags_follow_from_the_hypernetwork(hypernetwork_model):
    launch = plan(str(hypernetwork_model), {"F2L_HOME": "/data"}, [])
    assert launch.argv[3:5] == ["serve", str(hypernetwork_model)]
    assert "--enable-lora" in launch.argv
    assert flag(launch.argv, "--max-lora-rank") == "16"  # three videos in one question at rank 4, and the bias
    assert flag(launch.argv, "--lora-target-modules") == "down_proj"
    assert flag(launch.argv, "--host") == "127.0.0.1"
    assert int(flag(launch.argv, "--max-loras")) >= int(flag(launch.argv, "--max-num-seqs"))
    assert launch.env["F2L_HYPERNETWORK"] == str(hypernetwork_model / "hypernetwork")
    assert launch.env["F2L_HOME"] == "/data"
    assert launch.env["VLLM_PLUGINS"].split(",") == list(PLUGINS)


def test_idle_connections_outlive_a_clients_use_of_them_unless_told_otherwise(hypernetwork_model, monkeypatch):
    def seconds():
        return int(plan(str(hypernetwork_model), {}, []).env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"])

    monkeypatch.delenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", raising=False)
    assert seconds() > httpx.Limits().keepalive_expiry
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "3")
    assert seconds() == 3


def test_a_collector_of_spans_is_named_by_a_flag_or_a_variable_for_all_processes(hypernetwork_model, monkeypatch):
    for name in (tracing.ENDPOINT, tracing.SERVICE):
        monkeypatch.delenv(name, raising=False)
    silent = plan(str(hypernetwork_model), {}, [])
    assert not any("otlp" in word for word in silent.argv)
    assert tracing.ENDPOINT not in silent.env
    by_flag = plan(str(hypernetwork_model), {}, ["--otlp-traces-endpoint", "http://a:4317"])
    monkeypatch.setenv(tracing.ENDPOINT, "http://a:4317")
    monkeypatch.setenv(tracing.SERVICE, "mine")
    by_variable = plan(str(hypernetwork_model), {}, [])
    for launch, service in ((by_flag, "f2l-vllm"), (by_variable, "mine")):
        assert flag(launch.argv, "--otlp-traces-endpoint") == launch.env[tracing.ENDPOINT] == "http://a:4317"
        assert launch.env[tracing.SERVICE] == service


def test_what_the_user_says_wins(hypernetwork_model):
    given = ["--max_loras=4", "--host", "0.0.0.0", "--max-lora-rank", "64"]
    argv = plan(str(hypernetwork_model), {}, given).argv
    assert flag(argv, "--max-lora-rank") == "64"
    assert "--max-loras" not in argv
    assert argv.count("--host") == 1


def test_chunks_and_videos_in_one_question_make_the_rank_larger(hypernetwork_model):
    settings = {"F2L_CHUNK_SECONDS": "10", "F2L_MAX_CHUNKS": "7"}
    argv = plan(str(hypernetwork_model), settings, []).argv
    assert flag(argv, "--max-lora-rank") == "32"  # seven chunks at rank 4, and the bias
    assert flag(plan(str(hypernetwork_model), {"F2L_MAX_CHUNKS": "7"}, []).argv, "--max-lora-rank") == "32"
    assert flag(plan(str(hypernetwork_model), {"F2L_MAX_CHUNKS": "1"}, []).argv, "--max-lora-rank") == "8"
    with pytest.raises(ValueError, match="lower --max-chunks"):
        plan(str(hypernetwork_model), {**settings, "F2L_MAX_CHUNKS": "1000"}, [])
    with pytest.raises(ValueError, match="one of chunk_seconds and chunk_frames"):
        plan(str(hypernetwork_model), {**settings, "F2L_CHUNK_FRAMES": "8"}, [])


@pytest.mark.parametrize("rate", ["1", "-0.1", "1.5", "half"])
def test_a_pruning_rate_that_is_none_is_refused_before_anything_starts(hypernetwork_model, rate):
    for flags in (["--video-pruning-rate", rate], [f"--video_pruning_rate={rate}"]):
        with pytest.raises(ValueError, match=f"--video-pruning-rate {rate}: "):
            plan(str(hypernetwork_model), {}, flags)


def test_rates_of_merging_reach_vllm_and_the_workers(hypernetwork_model):
    launch = plan(str(hypernetwork_model), {"F2L_MERGE_RATE": "0.5"}, ["--video-pruning-rate", "0.7"])
    assert flag(launch.argv, "--video-pruning-rate") == "0.7"
    assert launch.env["F2L_MERGE_RATE"] == "0.5"
    with pytest.raises(ValueError, match="--merge-rate=1"):
        plan(str(hypernetwork_model), {"F2L_MERGE_RATE": "1"}, [])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("F2L_DATABASE_URL", "mysql://host/name", "SQLite or PostgreSQL, not 'mysql'"),
        ("F2L_DATABASE_URL", "not a url", "no database URL"),
        ("F2L_LISTEN_URL", "postgresql://f2l@host/catalog", "for a catalog in PostgreSQL"),
        ("F2L_STORE", "nothing://bucket", "nothing"),
    ],
)
def test_a_place_that_nothing_can_be_kept_in_is_refused_before_anything_starts(
    hypernetwork_model, name, value, message
):
    with pytest.raises(ValueError, match=message):
        plan(str(hypernetwork_model), {name: value}, [])


def test_settings_are_said_by_flags_too(hypernetwork_model, tmp_path):
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps({"a": ["k" * 32]}))
    flags = {
        "--hypernetwork": str(hypernetwork_model / "hypernetwork"),
        "--hypernetwork-workers": "2",
        "--worker-cpus": "0.5",
        "--worker-gpus": "0.0",
        "--queue-limit": "9",
        "--max-frames": "8",
        "--fps": "0.5",
        "--chunk-seconds": "10.0",
        "--max-chunks": "2",
        "--merge-rate": "0.25",
        "--batch-tokens": "100",
        "--home": str(tmp_path / "home"),
        "--store": "memory://videos",
        "--database-url": "postgresql://f2l@host/catalog",
        "--cache-bytes": "1000",
        "--hot-bytes": "0",
        "--warm-adapters": "7",
        "--tenants": str(tenants),
        "--log-level": "debug",
        "--shutdown-seconds": "5.0",
    }
    arguments = [word for flag in flags.items() for word in flag]
    result = CliRunner().invoke(app, ["serve", str(hypernetwork_model), *arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    for flag, value in flags.items():
        assert f"F2L_{flag[2:].replace('-', '_').upper()}={value}" in result.output
    assert not [flag for flag in flags if f"{flag} " in result.output]  # nothing of it reaches vLLM's command line


def test_a_hypernetwork_for_another_model_is_refused_before_anything_starts(hypernetwork_model):
    with pytest.raises(ValueError, match="this model has 4 layers"):
        plan(str(hypernetwork_model), {"F2L_HYPERNETWORK": str(models.resolve("f2l-tiny") / "hypernetwork")}, [])


def test_the_engine_is_forked_where_there_is_no_gpu_unless_told_otherwise(hypernetwork_model, monkeypatch):
    def method():
        return plan(str(hypernetwork_model), {}, []).env.get("VLLM_WORKER_MULTIPROC_METHOD")

    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    assert method() == "fork"
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    assert method() is None
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    monkeypatch.setattr(gpus, "find", lambda: gpus.Gpus(("0",), 80 << 30, 1))
    assert method() is None


def test_plugins_of_others_stay_allowed(hypernetwork_model, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "theirs,f2l")
    assert plan(str(hypernetwork_model), {}, []).env["VLLM_PLUGINS"] == "theirs,f2l,f2l_files,f2l_cpu"


def test_a_model_without_a_hypernetwork_says_how_to_name_one(smolvlm_dir):
    with pytest.raises(ValueError, match="--hypernetwork"):
        plan(str(smolvlm_dir), {}, [])


def test_a_model_that_is_nowhere_lists_what_would_work():
    with pytest.raises(ValueError, match="hub id"):
        plan("./nowhere", {}, [])
