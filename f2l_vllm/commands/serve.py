"""`f2l-vllm serve`: vLLM's own server with the flags and environment that videos need.

It replaces this process by `vllm serve`, so that the environment is in place before any library reads it and signals
go to vLLM directly; the endpoint plugin starts and stops Ray and the pool.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from f2l_vllm import models
from f2l_vllm.adapters.database import check_url as check_database
from f2l_vllm.adapters.peft_format import BaseShapes
from f2l_vllm.adapters.remote import check_url as check_store
from f2l_vllm.cpu.plugin import openmp_defaults
from f2l_vllm.hypernetwork.merging import check_rate
from f2l_vllm.hypernetwork.model import read_config
from f2l_vllm.serving import engine_defaults
from f2l_vllm.serving.engine_defaults import LORA_RANKS
from f2l_vllm.serving.tenants import Keys
from f2l_vllm.settings import Settings, refuse_environment

PLUGINS = ("f2l", "f2l_files", "f2l_cpu")


@dataclass(frozen=True)
class Launch:
    """A command line and the environment variables to add."""

    argv: list[str]
    env: dict[str, str]


def plan(model: str, hypernetwork: str | None, settings: dict[str, str], vllm_flags: list[str]) -> Launch:
    """The `vllm serve` command for a model. Flags given by the user win over the defaults here.

    Raises:
        ValueError: a setting that cannot work, no such model or hypernetwork, two that do not fit together, or adapters
            that no server could take.
    """
    refuse_environment(os.environ)
    _check_pruning_rate(vllm_flags)
    directory = models.resolve(model)
    weights = models.resolve_hypernetwork(model, hypernetwork)
    config = read_config(weights)
    BaseShapes.read(directory).check(config)
    chosen = _read(settings)
    check_database(chosen.catalog_url)
    if chosen.store is not None:
        check_store(chosen.store)
    rank = (_chunks(chosen, config.rank) + 1) * config.rank  # the bias takes the rank of one chunk
    allowed = engine_defaults.smallest_rank(rank)
    if allowed is None:
        raise ValueError(f"adapters would have rank {rank}, above vLLM's largest {LORA_RANKS[-1]}: lower --max-chunks")
    defaults = {
        "--host": ["127.0.0.1"],
        "--served-model-name": [model if not Path(model).exists() else directory.name],
        **engine_defaults.engine_flags(
            rank=allowed, modules=config.modules, is_small=model in models.shipped(), has_gpu=_has_gpu()
        ),
    }
    given = {flag.split("=")[0].replace("_", "-") for flag in vllm_flags if flag.startswith("--")}
    server_keys = [os.environ.get("VLLM_API_KEY", ""), *(["given"] if "--api-key" in given else [])]
    Keys([key for key in server_keys if key], chosen.tenants)  # stops here if they cannot work
    argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory), *vllm_flags]
    for flag, values in defaults.items():
        if flag not in given:
            argv += [flag, *values]
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    env = {
        **settings,
        "F2L_HYPERNETWORK": str(weights),
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, *PLUGINS])),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": os.environ.get(
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(engine_defaults.KEEP_ALIVE_SECONDS)
        ),
        "RAY_USAGE_STATS_ENABLED": "0",
        **openmp_defaults(os.environ),
    }
    return Launch(argv, env)


def serve(launch: Launch) -> None:
    """Become the server."""
    os.execvpe(launch.argv[0], launch.argv, {**os.environ, **launch.env})


def _check_pruning_rate(flags: Sequence[str]) -> None:
    """vLLM would say so too, after it has begun to start."""
    parser = argparse.ArgumentParser(prog="f2l-vllm serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--video-pruning-rate", "--video_pruning_rate")
    given = parser.parse_known_args(list(flags))[0].video_pruning_rate
    if given is None:
        return
    try:
        check_rate(float(given))
    except ValueError as error:
        raise ValueError(f"--video-pruning-rate {given}: {error}") from error


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _read(given: dict[str, str]) -> Settings:
    """Flags given and the environment. A setting that cannot be read stops here, not after the engine has started."""
    return Settings(**{name.removeprefix("F2L_").lower(): value for name, value in given.items()})  # type: ignore[arg-type]


def _chunks(settings: Settings, chunk_rank: int) -> int:
    """How many chunks an adapter has room for: those of one long video, or of several videos in one question. What
    nobody asked for is no reason to ask vLLM for more than it has."""
    if settings.is_chunked or "max_chunks" in settings.model_fields_set:
        return settings.max_chunks
    return max(1, min(settings.max_chunks, LORA_RANKS[-1] // chunk_rank - 1))
