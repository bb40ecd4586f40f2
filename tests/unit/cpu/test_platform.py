"""When the platform takes over, and what it sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm.platforms
import vllm.plugins
from vllm import EngineArgs
from vllm.utils.system_utils import get_mp_context
from vllm.v1.attention.selector import AttentionSelectorConfig

from f2l_vllm.cpu import plugin
from f2l_vllm.cpu.platform import TorchCpuPlatform
from tests.support.vllm_names import cli_env_setup


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that no platform recognises."""
    monkeypatch.delenv("F2L_CPU_PLATFORM", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(vllm.platforms, "builtin_platform_plugins", {"cuda": lambda: None})


@pytest.fixture
def accelerated(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU vLLM recognises."""
    monkeypatch.setattr(vllm.platforms, "builtin_platform_plugins", {"cuda": lambda: "vllm.platforms.cuda.Cuda"})


@pytest.mark.usefixtures("alone")
class TestWithoutAnAccelerator:
    def test_takes_over(self) -> None:
        assert plugin.register() == plugin.PLATFORM

    def test_says_the_same_when_asked_again(self) -> None:
        assert plugin.register() == plugin.register()

    def test_leaves_vllm_alone_when_told_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("F2L_CPU_PLATFORM", "0")
        assert plugin.register() is None
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

    def test_a_probe_that_fails_found_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> str:
            raise OSError("libcuda.so.1: cannot open shared object file")

        monkeypatch.setattr(vllm.platforms, "builtin_platform_plugins", {"cuda": broken})
        assert plugin.register() == plugin.PLATFORM

    def test_yields_to_another_platform_plugin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        others = {"npu": lambda: "npu.Platform", "f2l_cpu": plugin.register}
        monkeypatch.setattr(vllm.plugins, "load_plugins_by_group", lambda group: others)
        assert plugin.register() is None

    def test_empty_cuda_visible_devices_does_not_leave_triton_on(self) -> None:
        plugin.register()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"

    def test_openmp_spins_for_a_moment_unless_told_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def waiting() -> tuple[str | None, str | None]:
            plugin.register()
            return os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")

        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        assert waiting() == ("ACTIVE", None)
        monkeypatch.delenv("OMP_WAIT_POLICY")
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")
        assert waiting() == ("PASSIVE", "7")
        monkeypatch.delenv("OMP_WAIT_POLICY")
        monkeypatch.delenv("GOMP_SPINCOUNT")
        assert waiting() == ("PASSIVE", "2000")


@pytest.mark.usefixtures("accelerated")
class TestWithAnAccelerator:
    def test_is_inert(self) -> None:
        before = dict(os.environ)
        assert plugin.register() is None
        assert dict(os.environ) == before

    def test_can_be_forced_and_then_hides_the_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("F2L_CPU_PLATFORM", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        assert plugin.register() == plugin.PLATFORM
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"


@pytest.mark.usefixtures("alone")
def test_bad_mode_is_an_error_where_vllm_cannot_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("F2L_CPU_PLATFORM", "yes")
    assert plugin.register() == plugin.PLATFORM
    with pytest.raises(ValueError, match=r"F2L_CPU_PLATFORM='yes' is not valid: use one of auto, 0, 1"):
        TorchCpuPlatform()


@pytest.fixture
def configure(smolvlm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`configure(**engine_arguments)`: the configuration an engine would run with."""
    monkeypatch.delenv("F2L_CPU_KV_BYTES", raising=False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return lambda **arguments: EngineArgs(model=str(smolvlm_dir), max_model_len=256, **arguments).create_engine_config()


def test_engine_keeps_its_worker_inside_and_the_environment_as_it_was(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    config = configure(enable_lora=True)
    assert config.parallel_config.distributed_executor_backend == "uni"
    assert config.parallel_config.worker_cls == "f2l_vllm.cpu.worker.TorchCPUWorker"
    assert os.environ["LD_PRELOAD"] == ""


@pytest.mark.parametrize(("asked", "found"), [("fork", "fork"), ("spawn", "spawn"), (None, "spawn")])
def test_the_engine_is_forked_if_a_launcher_says_so(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, asked: str | None, found: str
) -> None:
    """vLLM's CPU platform spawns it whatever the environment says; its command line does unless that says it."""
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    if asked is not None:
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", asked)
    cli_env_setup()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == found
    configure()
    assert get_mp_context().get_start_method() == found


def test_layers_run_in_pytorch_without_compilation(configure: Callable[..., Any]) -> None:
    config = configure()
    assert config.compilation_config.custom_ops == ["none"]
    assert config.compilation_config.mode.name == "NONE"
    assert not config.use_v2_model_runner


def test_chunked_prefill_and_prefix_caching_are_on(configure: Callable[..., Any]) -> None:
    config = configure()
    assert config.scheduler_config.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.user_specified_block_size  # `update_block_size_for_backend` leaves such a size alone
    assert config.cache_config.block_size == 32


def test_given_block_size_is_kept(configure: Callable[..., Any]) -> None:
    assert configure(block_size=16).cache_config.block_size == 16


def test_kv_cache_has_a_size(configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert configure().cache_config.kv_cache_memory_bytes == 1 << 30
    monkeypatch.setenv("F2L_CPU_KV_BYTES", "5000000")
    assert configure().cache_config.kv_cache_memory_bytes == 5000000
    assert configure(kv_cache_memory_bytes=7000000).cache_config.kv_cache_memory_bytes == 7000000


@pytest.mark.parametrize("value", ["1GiB", "0", "-5", ""])
def test_bad_kv_size_is_an_error(configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("F2L_CPU_KV_BYTES", value)
    with pytest.raises(ValueError, match="F2L_CPU_KV_BYTES"):
        configure()


def test_missing_lscpu_is_an_error_that_names_the_package(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Exception, match="util-linux"):
        configure()


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"use_mla": True}, "MLA"),
        ({"has_sliding_window": True}, "sliding window"),
        ({"has_sink": True}, "sinks"),
        ({"use_sparse": True}, "sparse"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
    ],
)
def test_models_it_cannot_serve_are_refused_by_name(feature: dict[str, Any], said: str) -> None:
    import torch

    plain = AttentionSelectorConfig(head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=32)
    backend = TorchCpuPlatform.get_attn_backend_cls(None, plain)
    assert backend == "f2l_vllm.cpu.attention.TorchAttentionBackend"
    with pytest.raises(NotImplementedError, match=said):
        TorchCpuPlatform.get_attn_backend_cls(None, plain._replace(**feature))
