"""The GPUs of this machine, as vLLM and Ray count them: the driver's, less those that a variable hides. CUDA is not
initialised."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from f2l_vllm.cpu.plugin import MODE_VARIABLE

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER = "CUDA_DEVICE_ORDER"


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a machine.

    Attributes:
        ids: those that a process of this environment sees, in CUDA's order, as `CUDA_VISIBLE_DEVICES` names them.
        bytes: memory of the smallest of `ids`, a MIG instance's own; 0: unknown.
        present: how many there are, hidden ones too.
        cuda: the newest CUDA that the driver runs, for example (13, 0); None: unknown.
        trouble: what the driver says instead of an answer.
        name: of the first, as CUDA names it; None: unknown.
    """

    ids: tuple[str, ...] = ()
    bytes: int = 0
    present: int = 0
    cuda: tuple[int, int] | None = None
    trouble: str | None = None
    name: str | None = None

    @property
    def count(self) -> int:
        """How many a process sees."""
        return len(self.ids)

    @property
    def are_hidden(self) -> bool:
        """Whether there are GPUs and none may be used. vLLM looks for one all the same: its choice of a platform reads
        the driver alone (`platforms/__init__.py`)."""
        return self.present > 0 and not self.ids

    def unused(self) -> str | None:
        """Why a GPU that the machine may have is not used, as a sentence; None if it has none, or they are used."""
        if self.trouble:
            return (
                f"the GPU's driver does not answer ({self.trouble}; see nvidia-smi), so this runs on the CPU: after an "
                "update of the driver restart the machine, in a container give it the GPUs (--gpus all)"
            )
        if self.are_hidden:
            many = "the GPU" if self.present == 1 else f"all {self.present} GPUs"
            return f"{VISIBLE}={os.environ.get(VISIBLE, '')!r} hides {many} of this machine, so this runs on the CPU"
        return None

    def mismatch(self, built_for: str | None) -> str | None:
        """Why torch could not use these GPUs, as a sentence.

        Args:
            built_for: the CUDA that torch was built for, `torch.version.cuda`.
        """
        if not self.ids or self.cuda is None:  # not NVIDIA's
            return None
        if built_for is None:
            return "torch is built without CUDA, and there is a GPU: install pip's default, or set F2L_CPU_PLATFORM=1"
        if self.cuda[0] < int(built_for.split(".")[0]):
            has = f"{self.cuda[0]}.{self.cuda[1]}"
            return f"the GPU's driver runs CUDA up to {has}, and torch is built for {built_for}: install a newer driver"
        return None


def drivers_order(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable that has CUDA number GPUs as the driver does, if none is set: its own default is the fastest first,
    and then a number means one GPU here and another to vLLM."""
    return {} if _ORDER in environment else {_ORDER: "PCI_BUS_ID"}


def find(environment: Mapping[str, str] = os.environ) -> Gpus:
    """The GPUs that vLLM and Ray find here; none if this package's CPU platform is asked for.

    Raises:
        ValueError: `CUDA_VISIBLE_DEVICES` names something that is not here.
    """
    if environment.get(MODE_VARIABLE) == "1":
        return Gpus()
    from ray._private.accelerators import NvidiaGPUAcceleratorManager, get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    if manager is None or manager is NvidiaGPUAcceleratorManager:
        return _nvidia(environment.get(VISIBLE))
    present = manager.get_current_node_num_accelerators()
    named = manager.get_current_process_visible_accelerator_ids()
    ids = visible(None if named is None else ",".join(named), present)
    return Gpus(ids, present=present)


def visible(text: str | None, present: int) -> tuple[str, ...]:
    """The GPUs that CUDA sees under this value of `CUDA_VISIBLE_DEVICES`, as `torch.cuda` reads it.

    CUDA reads the list up to the first entry that is none, and a list with an entry twice as empty. Of several MIG
    instances a process sees the first.

    Args:
        text: None: not set.
        present: how many GPUs the machine has.
    """
    if text is None:
        return tuple(map(str, range(present)))
    ids: list[str] = []
    for word in text.split(","):
        if text[:4] in ("GPU-", "MIG-"):
            name = word if word.startswith(text[:4]) else None
        else:
            number = re.match(r"\+?\d+", word.strip())
            name = None if number is None else str(int(number[0]))
        if name in ids:
            return ()
        if name is None or (name.isdigit() and int(name) >= present):
            break
        ids.append(name)
    return tuple(ids[:1] if text.startswith("MIG-") else ids[:present])


def _nvidia(named: str | None) -> Gpus:
    from ray._private.thirdparty import pynvml as nvml

    try:
        nvml.nvmlInit()
        try:
            present = nvml.nvmlDeviceGetCount()
            cuda = nvml.nvmlSystemGetCudaDriverVersion()
            seen = _seen(named, [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(present)])
            size, name = 0, None
            with suppress(nvml.NVMLError):  # a GPU that shares the machine's memory has none of its own to tell
                name = next((str(nvml.nvmlDeviceGetName(handle)) for handle in seen.values()), None)
                size = min((int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in seen.values()), default=0)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        no_driver = nvml.nvmlExceptionClass(nvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        return Gpus(trouble=None if isinstance(error, no_driver) else str(error))
    return Gpus(tuple(seen), size, present, (cuda // 1000, cuda % 1000 // 10), name=name)


def _seen(named: str | None, handles: list[Any]) -> dict[str, Any]:
    """NVML's handle of each GPU or MIG instance that a process sees, by the name it has in `CUDA_VISIBLE_DEVICES`.

    A GPU in MIG mode has no device but its instances. A process sees one of them, and then no other GPU.

    Raises:
        ValueError: an entry names nothing here, or no single device.
    """
    from ray._private.thirdparty import pynvml as nvml

    ids = visible(named, len(handles))
    if named is not None and handles:
        _refuse_unknown(named, ids, len(handles))
    seen, empty = dict[str, Any](), list[str]()
    for name in ids:
        if name.startswith("MIG-"):
            slices = [one for handle in handles for one in _slices(handle)]
            return {name: _the_one(name, [(one, _slice_names(one)) for one in slices])}
        handle = handles[int(name)] if name.isdigit() else None
        if handle is None:
            handle = _the_one(name, [(one, [str(nvml.nvmlDeviceGetUUID(one))]) for one in handles])
        if any(handle is one for one in seen.values()):
            raise ValueError(f"{VISIBLE}={named} names a GPU twice, and CUDA then uses none: name each once")
        seen[name] = handle
    for name, handle in list(seen.items()):
        if not _in_mig_mode(handle):
            continue
        if slices := _slices(handle):
            return {name: slices[0]}
        empty.append(name)
        del seen[name]
    if empty and not seen:
        raise ValueError(
            f"GPU {', '.join(empty)} is in MIG mode and has no instance: make one (nvidia-smi mig -cgi PROFILE -C), or "
            f"name another GPU in {VISIBLE}"
        )
    return seen


def _refuse_unknown(named: str, ids: tuple[str, ...], present: int) -> None:
    """Refuse a list that CUDA would cut at a GPU that is not there, or read as empty. Words such as -1 mean the cut."""
    words = [word.strip() for word in named.split(",")]
    if named.startswith("MIG-") or len(ids) == len(words):
        return
    if not ids and len(set(words)) < len(words):
        raise ValueError(f"{VISIBLE}={named} names a GPU twice, and CUDA then uses none: name each once")
    unknown = words[len(ids)]
    is_number = re.match(r"\+?\d", unknown) is not None
    if re.match(r"GPU-|MIG-", unknown) or (is_number and named.startswith("GPU-")):
        raise ValueError(f"{VISIBLE}={named} mixes ways to name a GPU: give numbers alone, GPU-… alone, or one MIG-…")
    if is_number:
        raise ValueError(
            f"{VISIBLE}={named}: this machine has no GPU {unknown}, but {present}, counted from 0 (nvidia-smi -L lists "
            "them)"
        )


def _the_one(name: str, known: list[tuple[Any, list[str]]]) -> Any:
    """The device with this name, or the only one whose name begins so."""
    same = [one for one, names in known if name in names]
    begun = same or [one for one, names in known if any(other.startswith(name) for other in names)]
    if len(begun) != 1:
        what = "nothing on this machine" if not begun else f"{len(begun)} devices of this machine"
        raise ValueError(f"{VISIBLE}: {name} names {what}: give a whole name that nvidia-smi -L lists")
    return begun[0]


def _in_mig_mode(handle: Any) -> bool:
    from ray._private.thirdparty import pynvml as nvml

    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError:  # a GPU without MIG
        return False


def _slices(handle: Any) -> list[Any]:
    """The MIG instances of a GPU, in the driver's order."""
    from ray._private.thirdparty import pynvml as nvml

    found: list[Any] = []
    if _in_mig_mode(handle):
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with suppress(nvml.NVMLError):  # places are numbered with gaps
                found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
    return found


def _slice_names(handle: Any) -> list[str]:
    """How a MIG instance is named: by its own id, or by those of its GPU and its places there."""
    from ray._private.thirdparty import pynvml as nvml

    gpu = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))
    places = f"{nvml.nvmlDeviceGetGpuInstanceId(handle)}/{nvml.nvmlDeviceGetComputeInstanceId(handle)}"
    return [str(nvml.nvmlDeviceGetUUID(handle)), f"MIG-{gpu}/{places}"]
