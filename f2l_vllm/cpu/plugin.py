"""Entry point `vllm.platform_plugins`: decides whether this process runs vLLM on this package's CPU platform."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from f2l_vllm import torch_shims
from f2l_vllm.lifeline import end_with_spawner

PLATFORM = "f2l_vllm.cpu.platform.TorchCpuPlatform"
MODE_VARIABLE = "F2L_CPU_PLATFORM"
METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
_MODES = ("auto", "0", "1")


def register() -> str | None:
    """Return the platform's class path, or None to leave vLLM alone.

    `F2L_CPU_PLATFORM` decides: `auto` (the default) takes over only if no other platform recognises the machine,
    `1` always, `0` never. vLLM calls this more than once per process and hides exceptions raised here, so a bad value
    selects the platform, whose constructor raises the error.
    """
    end_with_spawner()  # vLLM asks for platforms long before it loads other plugins
    mode = os.environ.get(MODE_VARIABLE, "auto")
    if mode == "0" or (mode == "auto" and _other_platform() is not None):
        return None
    _prepare_process()
    return PLATFORM


def check_mode() -> None:
    """Raise ValueError when `F2L_CPU_PLATFORM` is set to something that has no meaning."""
    mode = os.environ.get(MODE_VARIABLE, "auto")
    if mode not in _MODES:
        raise ValueError(f"{MODE_VARIABLE}={mode!r} is not valid: use one of {', '.join(_MODES)}.")


def openmp_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """How OpenMP's threads wait for work, unless the environment sets `OMP_WAIT_POLICY`.

    Threads that spin until there is work take the cores from the API server and the engine's loop; threads that sleep
    at once have to be woken for every operation, which costs a quarter of a decoding step. So they spin for some 50
    microseconds: longer than the gap between two operations, and too short to be in the way.
    """
    if "OMP_WAIT_POLICY" in environment:
        return {}
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": environment.get("GOMP_SPINCOUNT", "2000")}


def engine_method(environment: Mapping[str, str]) -> dict[str, str]:
    """How a server on this platform starts its engine, unless the environment says it.

    A forked engine has what the API server has imported, which takes a third off a start. vLLM spawns it, because most
    accelerators cannot be used after a fork, and because its own CPU platform binds threads.
    """
    return {} if METHOD_VARIABLE in environment else {METHOD_VARIABLE: "fork"}


def _other_platform() -> str | None:
    """Class path of the platform vLLM would use without this plugin, or None when the machine has none."""
    from vllm.platforms import builtin_platform_plugins
    from vllm.plugins import PLATFORM_PLUGINS_GROUP, load_plugins_by_group

    others = [p for p in load_plugins_by_group(PLATFORM_PLUGINS_GROUP).values() if p is not register]
    for probe in (*builtin_platform_plugins.values(), *others):
        try:
            found = probe()
        except Exception:  # vLLM, too, treats a failing probe as a device that is absent
            continue
        if found is not None:
            return found
    return None


def _prepare_process() -> None:
    """Prepare this process and, through the environment, the engine processes that it spawns."""
    # libgomp reads these when it loads, so they only affect spawned processes; a launcher sets them for its own.
    os.environ.update(openmp_defaults(os.environ))
    # vLLM turns Triton off when no GPU driver is active, but skips that check when this variable is empty, as Ray
    # leaves it in actors without a GPU. "-1" hides every GPU and keeps the check.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # vLLM imports a library that builds GPU kernels at once, in processes that take 8 CPU seconds to fail here.
    os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"
    logging.getLogger("vllm.utils.flashinfer").setLevel(logging.ERROR)  # it misses CUDA's compiler
    torch_shims.install()
