"""The models and the video shipped with the package, and how a name given by a user becomes a directory or file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from f2l_vllm.base_models.registry import DEFAULT, FAMILIES
from f2l_vllm.files import read_json
from f2l_vllm.hypernetwork.locate import locate

DEFAULT_MODEL = "f2l-tiny"
_HERE = Path(__file__).parent
SAMPLE_VIDEO = _HERE / "sample.mp4"  # a held-out scene of the synthetic world, 8 s
HYPERNETWORK_FOLDER = "hypernetwork"
_HUB_SNAPSHOT = re.compile(r"/models--(?P<owner>(?:(?!--)[^/])+)--(?P<name>[^/]+)/snapshots/[^/]+$")
RELEASED_HYPERNETWORKS, RELEASED_FOR = DEFAULT.hypernetworks, DEFAULT.released_for


def shipped() -> list[str]:
    """Names of the models shipped with the package."""
    return sorted(p.parent.name for p in _HERE.glob("*/config.json"))


def resolve(reference: str) -> Path:
    """A model directory on disk: a shipped name, a path, or a hub repository (downloaded once).

    Raises:
        ValueError: none of these; the message lists what would work.
    """
    if (_HERE / reference / "config.json").is_file():
        return _HERE / reference
    path = Path(reference).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", reference) and not path.exists():
        return _download(reference)
    raise ValueError(
        f"no model at {reference!r}: give a directory with a config.json, a hub id (owner/repository), or one of the "
        f"shipped models: {', '.join(shipped()) or 'none'}"
    )


def loadable_name(model: Path) -> str:
    """The name by which `from_pretrained` finds a model directory elsewhere: its hub id if downloaded, or its path."""
    model = model.absolute()
    repository = _HUB_SNAPSHOT.search(model.as_posix())
    return repository["owner"] + "/" + repository["name"] if repository else str(model)


def resolve_hypernetwork(model_reference: str, reference: str | None) -> Path:
    """The hypernetwork to use with a model: the one asked for, the model directory's own, or the released one.

    Raises:
        ValueError: none was found; the message says how to name one.
    """
    if reference is None:
        own = resolve(model_reference) / HYPERNETWORK_FOLDER
        if own.is_dir():
            return own
        if model_reference not in RELEASED_FOR:
            raise ValueError(_none_known(model_reference))
        reference = RELEASED_HYPERNETWORKS
    return locate(reference, base_model=recognised(model_reference) or model_reference)


def recognised(model_reference: str) -> str | None:
    """The released base model that a model is a copy of, by the sizes in its config, or None."""
    path = Path(model_reference).expanduser()
    try:
        config = read_json(path / "config.json")
        return next((name for family in FAMILIES.values() if (name := family.recognised(config))), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _none_known(model_reference: str) -> str:
    """The message for a model without a hypernetwork of its own; nothing is downloaded unless the user names it."""
    original = recognised(model_reference)
    released = f"the released ones, {RELEASED_HYPERNETWORKS}, are for {' and '.join(RELEASED_FOR)}"
    if original in RELEASED_FOR:
        return (
            f"{model_reference!r} holds no hypernetwork, but is {original} by its config, for which one is released: "
            f"add --hypernetwork {RELEASED_HYPERNETWORKS}, e.g. f2l-vllm serve {shlex.quote(model_reference)} "
            f"--hypernetwork {RELEASED_HYPERNETWORKS}"
        )
    what = f"{model_reference!r}, which is {original} by its config" if original else repr(model_reference)
    return (
        f"no hypernetwork is known for {what}: name one with --hypernetwork (a directory made by 'f2l-vllm convert' or "
        f"'f2l-vllm train', a released .pt file, or a hub id; {released})"
    )


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, ignore_patterns=["onnx/*", "*.gguf", "*.onnx"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{repository!r} is neither a local directory nor a hub repository that can be reached: {error}"
        ) from error
