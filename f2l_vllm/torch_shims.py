"""Let a CPU-only torch live next to CUDA builds of torchvision, torchaudio and torchcodec.

PyPI's builds of those packages link against CUDA's torch, so next to a CPU torch their compiled libraries do not
load, and importing them fails. For torchvision, which fails in `register_fake("torchvision::nms")`, declaring the two
schemas it names is enough, because nothing here calls the compiled operators. torchaudio is made to believe that it was
built without its extension, and works without it. torchcodec, which raises `OSError` where vLLM expects `ImportError`,
is hidden: it reads as "not installed". Where the libraries load, nothing is changed.

torch itself calls `with_torch` while it is imported, through the entry point `torch.backends` (torch's way to let a
package bring what a device needs). The shims therefore work in every process of the environment, whether transformers,
peft or vLLM is imported first, with or without this package. `install` is for processes in which torch was told to load
no backends.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_AUDIO_EXTENSION = "torchaudio._extension"
_keep_alive: list[object] = []  # a torch Library drops its definitions when it is collected


def with_torch() -> None:
    """Called by `import torch`. A torch built for GPUs is left alone: it comes with the libraries it needs."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        install()


def install() -> None:
    """Make torchvision and torchaudio importable, and a broken torchcodec read as absent. Idempotent."""
    import torch  # first: importing it may call `install`, and the checks below see what that call did

    if not _keep_alive and not _is_imported("torchvision") and _is_broken("torchvision", "_C*.so"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _keep_alive.append(library)
    if _AUDIO_EXTENSION not in sys.modules and _is_broken("torchaudio", "lib/_torchaudio*.so"):
        sys.modules[_AUDIO_EXTENSION] = _NoAudioExtension(_AUDIO_EXTENSION)
    if "torchcodec" not in sys.modules and _is_broken("torchcodec", "libtorchcodec_image*.so"):
        modules: dict[str, Any] = sys.modules
        modules["torchcodec"] = None  # import raises ImportError


class _NoAudioExtension(ModuleType):
    """The names that torchaudio's other modules import from `torchaudio._extension`, as if nothing was compiled."""

    _IS_TORCHAUDIO_EXT_AVAILABLE = False

    @staticmethod
    def _load_lib(name: str) -> bool:
        return False

    @staticmethod
    def fail_if_no_align(function: object) -> object:
        """Decorates functions that need the extension; when one is called, torch says which operator is missing."""
        return function


def _is_imported(package: str) -> bool:
    """Whether the import is complete: a package that is importing torch is not there yet."""
    module = sys.modules.get(package)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _is_broken(package: str, pattern: str) -> bool:
    """True when the package is installed and its compiled library does not load."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return False
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    if not libraries:
        return False
    import torch

    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return True
    return False
