"""Let a CPU-only torch live next to CUDA builds of torchvision, torchaudio and torchcodec.

PyPI's builds of those packages link against CUDA's torch, so next to a CPU torch their compiled libraries do not
load, and importing them fails. For torchvision, which fails in `register_fake("torchvision::nms")`, declaring the two
schemas it names is enough, because nothing here calls the compiled operators. torchaudio is told what it is told where
it was built without its extension, and works without. torchcodec, which raises `OSError` where vLLM expects
`ImportError`, is hidden: it reads as "not installed". Where the libraries load, nothing is changed.

torch itself calls `with_torch` while it is imported, by the entry point `torch.backends` (its own way to let a package
bring what a device needs). So it holds in every process of the environment, whoever imports what first: transformers,
peft or vLLM, with this package or without. `install` is for processes in which torch was told to load no backends.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_AUDIO_EXTENSION = "torchaudio._extension"
_keep_alive: list[object] = []  # a torch Library drops its definitions when it is collected


def with_torch() -> None:
    """What `import torch` calls. A torch built for GPUs has the libraries it came with and is left alone."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        install()


def install() -> None:
    """Make torchvision and torchaudio importable, and a broken torchcodec read as absent. Idempotent."""
    import torch  # first: it may call this itself, and what it has done then is seen below

    if not _keep_alive and not _is_imported("torchvision") and _is_broken("torchvision", "_C*.so"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _keep_alive.append(library)
    if _AUDIO_EXTENSION not in sys.modules and _is_broken("torchaudio", "lib/_torchaudio*.so"):
        sys.modules[_AUDIO_EXTENSION] = _NoAudioExtension(_AUDIO_EXTENSION)
    if "torchcodec" not in sys.modules and _is_broken("torchcodec", "libtorchcodec_image*.so"):
        sys.modules["torchcodec"] = None  # type: ignore[assignment]  # import raises ImportError


class _NoAudioExtension(ModuleType):
    """What torchaudio's other modules take from `torchaudio._extension`, as where nothing was compiled."""

    _IS_TORCHAUDIO_EXT_AVAILABLE = False

    @staticmethod
    def _load_lib(name: str) -> bool:
        return False

    @staticmethod
    def fail_if_no_align(function: object) -> object:
        """Decorates what needs the extension; torch says which operator is missing when it is called."""
        return function


def _is_imported(package: str) -> bool:
    """Whole: torch may be what the package is just importing."""
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
