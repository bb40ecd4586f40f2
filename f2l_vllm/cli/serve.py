"""`f2l-vllm serve`: vLLM's own server with the flags and environment that videos need.

`vllm serve` replaces this process, so that the environment is in place before any library reads it and signals go to
vLLM directly. The pool is started here, to load while the engine loads, or by the endpoint plugin, which also stops it.
Everything that can be checked without loading a model is checked first: `plan` checks the request,
`checks.check_now` the state of the machine.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from f2l_vllm import logs, models
from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.catalog.database import check_url as check_database
from f2l_vllm.catalog.listener import check_url as check_listening
from f2l_vllm.cli import checks
from f2l_vllm.cpu.plugin import check_mode, engine_method, openmp_defaults
from f2l_vllm.engine import defaults, flags
from f2l_vllm.engine.defaults import EngineLimits, check_limits, refuse_flags
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.config_file import read_config
from f2l_vllm.hypernetwork.fit import check_shapes
from f2l_vllm.hypernetwork.ranks import RANKS, most_chunks, smallest_rank
from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.pool.supervisor import start_early
from f2l_vllm.server.tenants import Keys
from f2l_vllm.settings import Settings, refuse_environment
from f2l_vllm.store.object_store import check_url as check_store

logger = logging.getLogger(__name__)

PLUGINS = ("f2l", "f2l_files", "f2l_cpu")


@dataclass(frozen=True)
class Launch:
    """A command line and the environment variables to add, with the inputs they were made from.

    Attributes:
        flags: vLLM's flags that the user gave.
        workers: workers that load while the engine loads; None: workers wait until the engine has loaded.
    """

    argv: list[str]
    env: dict[str, str]
    settings: Settings
    flags: Namespace
    workers: WorkerSpec | None


def plan(model: str, settings: dict[str, str], words: list[str]) -> Launch:
    """The `vllm serve` command for a model. Flags given by the user override the defaults here.

    Args:
        settings: the values of our own flags, as environment variables.
        words: the rest of the command line, which goes to vLLM.

    Raises:
        ValueError: a setting or flag cannot work, there is no such model or hypernetwork, the two do not fit together,
            no server could take the adapters, or the workers could never run here.
    """
    refuse_environment(os.environ)
    check_mode()
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    chosen_flags = flags.read(words)
    refuse_flags(chosen_flags)
    checks.check_paths(chosen_flags)
    chosen = Settings.read(settings)
    check_database(chosen.catalog_url)
    check_listening(chosen.listen_url, chosen.catalog_url)
    if chosen.store is not None:
        check_store(chosen.store)
    directory = models.resolve(model)
    shapes = BaseShapes.read(directory)  # refuses a directory that is not a base model
    weights = models.resolve_hypernetwork(model, chosen.hypernetwork)
    config = read_config(weights)
    check_shapes(shapes, config)
    rank = _rank(chosen, config, chosen_flags)
    gpus = checks.gpus()
    checks.check_workers(chosen, gpus)
    checks.check_engine(chosen_flags, directory, gpus)
    given = {f"--{name.replace('_', '-')}" for name in vars(chosen_flags)}
    usual = {
        "--host": ["127.0.0.1"],
        "--served-model-name": [model if not Path(model).exists() else directory.name],
        **({} if chosen.log_level == "debug" or "--use-tqdm-on-load" in given else {"--no-use-tqdm-on-load": []}),
        **defaults.engine_flags(
            rank=rank,
            modules=config.modules,
            is_small=model in models.shipped(),
            has_gpu=gpus > 0,
            slots=getattr(chosen_flags, "max_loras", None),
            places=getattr(chosen_flags, "max_cpu_loras", None),
        ),
    }
    server_keys = [os.environ.get("VLLM_API_KEY", ""), *(["given"] if "--api-key" in given else [])]
    Keys([key for key in server_keys if key], chosen.tenants)  # raises if the keys cannot work
    argv = [sys.executable, "-m", "f2l_vllm.engine", "serve", str(directory), *words]
    for flag, values in usual.items():
        if flag not in given:
            argv += [flag, *values]
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    env = {
        **settings,
        "F2L_HYPERNETWORK": str(weights),
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, *PLUGINS])),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": os.environ.get(
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(defaults.KEEP_ALIVE_SECONDS)
        ),
        "RAY_USAGE_STATS_ENABLED": "0",
        **logs.environment(os.environ, words),
        **openmp_defaults(os.environ),
        **({} if gpus else engine_method(os.environ)),
    }
    workers = None
    # On a GPU the workers wait: the engine first measures the free memory and takes its share.
    if chosen.hypernetwork_workers and not gpus and chosen.ray_address is None:
        max_rank = int(getattr(chosen_flags, "max_lora_rank", None) or rank)
        workers = WorkerSpec.of(chosen, model=directory, hypernetwork=weights, rank=config.rank, max_rank=max_rank)
    return Launch(argv, env, chosen, chosen_flags, workers)


def serve(launch: Launch) -> None:
    """Replace this process by the server.

    Raises:
        ValueError: something on this machine prevents it.
    """
    checks.check_now(launch.settings, launch.flags)
    logs.configure("server")
    logger.info("starting vLLM with %s; until the model is loaded it says little", launch.argv[4])
    os.environ.update(launch.env)
    if launch.workers is not None:
        os.environ.update(start_early(launch.workers))
    os.execvp(launch.argv[0], launch.argv)


def _rank(settings: Settings, config: HypernetworkConfig, flags: Namespace) -> int:
    """The engine's rank: room for the chunks of one long video, or for several videos in one question. A default number
    of chunks is lowered to what vLLM's largest rank allows; a given number that is too large is refused."""
    most = most_chunks(config.rank)
    if most < 1:
        limit = f"vLLM's largest is {RANKS[-1]}, which is two of rank {RANKS[-1] // 2}: the video's and the bias"
        raise ValueError(f"this hypernetwork makes adapters of rank {2 * config.rank}; {limit}")
    chunks = settings.max_chunks
    if not (settings.reading.is_chunked or "max_chunks" in settings.model_fields_set):
        chunks = min(chunks, most)
    rank = smallest_rank((chunks + 1) * config.rank)  # the bias takes the rank of one chunk
    if rank is None:
        raise ValueError(
            f"{chunks} chunks would need rank {(chunks + 1) * config.rank}, above vLLM's largest {RANKS[-1]}: "
            f"lower --max-chunks to {most} or less"
        )
    asked = int(getattr(flags, "max_lora_rank", None) or rank)
    modules = getattr(flags, "lora_target_modules", None)
    limits = EngineLimits(asked, 0, frozenset(modules) if modules else None)
    check_limits(limits, rank=2 * config.rank, modules=config.modules)
    return rank
