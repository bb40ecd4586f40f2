"""The GPUs of this machine, as vLLM and Ray count them: the driver's, less those that a variable hides. CUDA is not
initialised."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from f2l_vllm.cpu.plugin import MODE_VARIABLE

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a machine.

    Attributes:
        ids: those that a process of this environment sees, in CUDA's order, as `CUDA_VISIBLE_DEVICES` names them.
        bytes: memory of the smallest; 0: unknown.
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


def find(environment: Mapping[str, str] = os.environ) -> Gpus:
    """The GPUs that vLLM and Ray find here; none if this package's CPU platform is asked for."""
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
            ids = visible(named, present)
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(present)]
            size, name = 0, None
            with suppress(nvml.NVMLError):  # a GPU that shares the machine's memory has none of its own to tell
                if ids and ids[0].startswith("MIG-"):
                    handles = [nvml.nvmlDeviceGetHandleByUUID(ids[0])]
                chosen = handles[int(ids[0])] if ids and ids[0].isdigit() else handles[0]
                name = str(nvml.nvmlDeviceGetName(chosen)) if ids else None
                size = min((int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles), default=0)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        no_driver = nvml.nvmlExceptionClass(nvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        return Gpus(trouble=None if isinstance(error, no_driver) else str(error))
    return Gpus(ids, size, present, (cuda // 1000, cuda % 1000 // 10), name=name)
