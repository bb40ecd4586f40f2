"""Checks before a server loads anything: resources, paths, ports, which server holds the data folder.

Each check raises a `ValueError` whose message is one sentence that says what to do.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
from argparse import Namespace
from pathlib import Path

from filelock import FileLock, Timeout

from f2l_vllm.catalog.database import check_reachable
from f2l_vllm.engine.defaults import is_on_one_machine
from f2l_vllm.settings import SERVER_LOCK, Settings

_LEAST_SHARE = 0.0001  # of a GPU or CPU: Ray knows no smaller share
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def check_workers(settings: Settings, found: int) -> None:
    """Refuse workers that Ray could never place, or whose reservation it does not accept.

    Args:
        found: GPUs of this machine. They do not matter for a joined cluster: its GPUs come and go, and `/ready` says
            what is missing.
    """
    share, workers = settings.worker_gpus or 0.0, settings.hypernetwork_workers
    for name, share_of in (("--worker-gpus", share), ("--worker-cpus", settings.worker_cpus)):
        if 0 < share_of < _LEAST_SHARE:
            raise ValueError(f"{name} {share_of:g} is less than Ray reserves: give 0, or {_LEAST_SHARE} or more")
    if share > 1 and not share.is_integer():
        raise ValueError(f"--worker-gpus {share:g}: Ray shares one GPU, or gives whole ones; give {int(share)}")
    if not share or not workers or settings.ray_address is not None:
        return
    room = found * int(1 / share + 1e-9) if share <= 1 else found // int(share)
    if room < workers:
        have = "this machine has no GPU" if not found else f"this machine's {found} GPU{'s' * (found > 1)}"
        have = f"{have} that vLLM or Ray could use" if not found else f"{have} hold {room} of them"
        what = "leave out --worker-gpus" if not room else f"lower --hypernetwork-workers to {room}, or --worker-gpus"
        raise ValueError(f"{workers} hypernetwork worker{'s' * (workers > 1)} of {share:g} GPU: {have}; {what}")


def check_engine(flags: Namespace, model: Path, found: int) -> None:
    """Refuse what vLLM would refuse after reading the model's config, or when starting processes.

    Args:
        found: GPUs of this machine.
    """
    text = json.loads((model / "config.json").read_text())["text_config"]
    length, longest = getattr(flags, "max_model_len", None), text.get("max_position_embeddings")
    stretched = text.get("rope_scaling") or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1"
    if length and longest and length > longest and not (stretched or hasattr(flags, "hf_overrides")):
        raise ValueError(f"--max-model-len {length}: the model was made for {longest} tokens at most")
    tensor = _tensor_parallel(flags)
    if tensor < 1:
        raise ValueError(f"--tensor-parallel-size {tensor} must be at least 1")
    if text["num_attention_heads"] % tensor:
        heads = f"the model's {text['num_attention_heads']} attention heads cannot be shared by {tensor}"
        raise ValueError(f"--tensor-parallel-size {tensor}: {heads}; give a divisor of their number")
    world = engine_gpus(flags)
    if found and is_on_one_machine(flags) and world > found:
        raise ValueError(
            f"the engine would need {world} GPUs, and this machine has {found}: lower what multiplies to it"
        )
    dtype = getattr(flags, "dtype", None)
    if found and dtype in ("float32", "float"):
        raise ValueError(
            f"--dtype {dtype}: on a GPU vLLM computes adapters in bfloat16 or float16 only (its LoRA kernels); leave "
            "the flag out"
        )
    slots, places = getattr(flags, "max_loras", None), getattr(flags, "max_cpu_loras", None)
    if slots and places and places < slots:
        raise ValueError(f"--max-cpu-loras {places} must be at least --max-loras, which is {slots}")


def engine_gpus(flags: Namespace) -> int:
    """How many GPUs the engine takes."""
    return _tensor_parallel(flags) * int(getattr(flags, "pipeline_parallel_size", 1))


def _tensor_parallel(flags: Namespace) -> int:
    given = getattr(flags, "tensor_parallel_size", None)
    return 1 if given is None else int(given)


def check_paths(flags: Namespace) -> None:
    """Refuse files that vLLM's flags name and that do not exist."""
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(flags, name, None)
        if path and not Path(path).is_file():
            raise ValueError(f"--{name.replace('_', '-')}: there is no file {path}")
    template = getattr(flags, "chat_template", None)
    if template and not set("{}\n") & set(template) and not Path(template).is_file():
        raise ValueError(f"--chat-template: there is no file {template}")
    socket_path = getattr(flags, "uds", None)
    if socket_path and not Path(socket_path).absolute().parent.is_dir():
        raise ValueError(f"--uds {socket_path}: there is no folder {Path(socket_path).absolute().parent}")


def check_now(settings: Settings, flags: Namespace) -> None:
    """Check that a server could start here at this moment."""
    if not getattr(flags, "uds", None):
        check_listening(getattr(flags, "host", None) or DEFAULT_HOST, getattr(flags, "port", DEFAULT_PORT))
    check_folder(settings.data_folder)
    check_reachable(settings.catalog_url)


def check_listening(host: str, port: int) -> None:
    """Check that a server can listen at this address, in the way in which vLLM tries it."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} is no port: give one from 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except socket.gaierror as error:
            raise ValueError(f"--host {host} is no address or name that this machine can resolve") from error
        except OSError as error:
            raise ValueError(_why_not(error, host, port)) from error


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken by another program: stop that, or give another with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine: give one that is, or 0.0.0.0 for all"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has: give one above 1023 with --port"
    return f"{host}, port {port}, cannot be listened at: {error.strerror}"


def check_folder(folder: Path) -> None:
    """Check that the data folder can be written and that no other server holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"the data folder {folder} is no folder, or lies in none: set F2L_HOME or --home") from error
    except OSError as error:
        if error.errno == errno.ENOSPC and folder.is_dir():
            return  # users make room on a full disk through the server
        raise ValueError(
            f"the data folder {folder} cannot be written ({error.strerror}): set F2L_HOME or --home to one that can"
        ) from error
    try:
        with FileLock(folder / SERVER_LOCK).acquire(blocking=False):
            pass
    except Timeout as error:
        raise ValueError(
            f"another server runs on the data folder {folder}: stop it, or give this one another with --home"
        ) from error
