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

from f2l_vllm import logs, models, tracing
from f2l_vllm.cli import checks, gpu_shares, gpus, tune
from f2l_vllm.cpu.plugin import MODE_VARIABLE, check_mode, engine_method, openmp_defaults
from f2l_vllm.engine import defaults, flags, tuned
from f2l_vllm.engine.defaults import refuse_flags
from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.pool.supervisor import start_early
from f2l_vllm.server.inputs import Inputs
from f2l_vllm.server.tenants import Keys
from f2l_vllm.settings import Settings, refuse_environment

logger = logging.getLogger(__name__)

PLUGINS = ("f2l", "f2l_files", "f2l_cpu")


@dataclass(frozen=True)
class Launch:
    """A command line and the environment variables to add, with the inputs they were made from.

    Attributes:
        flags: vLLM's flags that the user gave.
        workers: workers that load while the engine loads; None: workers wait until the engine has loaded.
        gpus: what this machine has.
        shares: how engine and workers divide them.
    """

    argv: list[str]
    env: dict[str, str]
    settings: Settings
    flags: Namespace
    workers: WorkerSpec | None
    gpus: gpus.Gpus
    shares: gpu_shares.Shares

    @property
    def model(self) -> str:
        """The base model: a directory or a hub id."""
        return self.argv[4]


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
    inputs = Inputs.read(model, settings)
    chosen, directory, config = inputs.settings, inputs.model, inputs.config
    rank = inputs.engine_rank(chosen_flags)
    found = gpus.find()
    checks.check_engine(chosen_flags, directory, found.count)
    shares = _shares(inputs, chosen_flags, found)
    checks.check_workers(chosen, shares.devices.count(",") + 1 if shares.devices else found.count)
    given = {f"--{name.replace('_', '-')}" for name in vars(chosen_flags)}
    usual = {
        "--host": ["127.0.0.1"],
        "--served-model-name": [model if not Path(model).exists() else directory.name],
        **({} if chosen.log_level == "debug" or "--use-tqdm-on-load" in given else {"--no-use-tqdm-on-load": []}),
        **defaults.engine_flags(
            rank=rank,
            modules=config.modules,
            is_small=model in models.shipped(),
            has_gpu=found.count > 0,
            slots=getattr(chosen_flags, "max_loras", None),
            places=getattr(chosen_flags, "max_cpu_loras", None),
        ),
        **({} if shares.engine is None else {"--gpu-memory-utilization": [f"{shares.engine:g}"]}),
    }
    server_keys = [os.environ.get("VLLM_API_KEY", ""), *(["given"] if "--api-key" in given else [])]
    Keys([key for key in server_keys if key], chosen.tenants)  # raises if the keys cannot work
    collector = getattr(chosen_flags, "otlp_traces_endpoint", None) or os.environ.get(tracing.ENDPOINT)
    if collector:
        usual["--otlp-traces-endpoint"] = [collector]
    argv = [sys.executable, "-m", "f2l_vllm.engine", "serve", str(directory), *words]
    for flag, values in usual.items():
        if flag not in given:
            argv += [flag, *values]
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    env = {
        **settings,
        "F2L_HYPERNETWORK": str(inputs.hypernetwork),
        **({"F2L_WORKER_GPUS": f"{shares.worker:g}"} if shares.worker and chosen.worker_gpus is None else {}),
        **({"F2L_WORKER_DEVICES": shares.devices} if shares.devices and chosen.worker_devices is None else {}),
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, *PLUGINS])),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": os.environ.get(
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(defaults.KEEP_ALIVE_SECONDS)
        ),
        "RAY_USAGE_STATS_ENABLED": "0",
        **({} if tuned.VARIABLE in os.environ else tune.environment(inputs, chosen_flags, found.name)),
        **logs.environment(os.environ, words),
        **(tracing.environment(os.environ, collector) if collector else {}),
        **openmp_defaults(os.environ),
        **(gpus.drivers_order() if found.count else engine_method(os.environ)),
        # vLLM looks for a platform among all GPUs of the driver, and would fail on hidden ones.
        **({MODE_VARIABLE: "1"} if found.are_hidden and defaults.is_on_one_machine(chosen_flags) else {}),
    }
    workers = None
    # On a GPU the workers wait: the engine first measures the free memory and takes its share.
    if chosen.hypernetwork_workers and not shares.worker and chosen.ray_address is None:
        workers = inputs.workers(chosen_flags)
    return Launch(argv, env, chosen, chosen_flags, workers, found, shares)


def _shares(inputs: Inputs, flags: Namespace, found: gpus.Gpus) -> gpu_shares.Shares:
    settings = inputs.settings
    if settings.ray_address is not None or not defaults.is_on_one_machine(flags):
        return gpu_shares.Shares(settings.worker_gpus or 0.0)  # whose GPUs the workers get is for the cluster to say
    return gpu_shares.divide(
        found,
        workers=settings.hypernetwork_workers,
        need=gpu_shares.worker_bytes(inputs.model, inputs.hypernetwork) if found.count else 0,
        asked=settings.worker_gpus,
        engine_gpus=checks.engine_gpus(flags),
        engine_need=gpu_shares.engine_bytes(inputs.model) if found.count else 0,
        utilization=getattr(flags, "gpu_memory_utilization", None),
        part=settings.gpu_share,
    )


def serve(launch: Launch) -> None:
    """Replace this process by the server.

    Raises:
        ValueError: something on this machine prevents it.
    """
    checks.check_now(launch.settings, launch.flags)
    os.environ.update(launch.env)
    logs.configure("server")
    if unused := launch.gpus.unused():
        logger.warning("%s", unused)
    logger.info("starting vLLM with %s; until the model is loaded it says little", launch.model)
    if launch.workers is not None:
        os.environ.update(start_early(launch.workers))
    os.execvp(launch.argv[0], launch.argv)
