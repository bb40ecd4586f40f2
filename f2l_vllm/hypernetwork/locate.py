"""From what a user types to the file or directory that holds a hypernetwork."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_REF = re.compile(r"\w[\w.-]*/[\w.-]+(/[\w./-]+\.pt)?")
_SIZE = re.compile(r"\d+(\.\d+)?[mb]\b", re.IGNORECASE)


def locate(ref: str | Path, base_model: str | None = None) -> Path:
    """Path of a `.pt` file, or of a directory with `config.json` and `model.safetensors`; downloads when it must.

    Raises:
        ValueError: nothing was found, or there are several files to choose from.
    """
    path = Path(ref).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        return path / choose(names, str(ref), base_model)
    if _HUB_REF.fullmatch(str(ref)):
        return _download(str(ref), base_model)
    raise ValueError(
        f"No hypernetwork at {str(ref)!r}: pass a .pt file, a directory with config.json and model.safetensors, "
        "or a Hugging Face repository id such as 'owner/name'."
    )


def choose(names: list[str], ref: str, base_model: str | None) -> str:
    """Name of the `.pt` file to read, or '' for the directory itself. Raises ValueError if there is no single one."""
    if "config.json" in names and "model.safetensors" in names:
        return ""
    checkpoints = [name for name in names if name.endswith(".pt")]
    if len(checkpoints) > 1 and base_model is not None:
        sizes = [match.group().lower() for match in _SIZE.finditer(base_model)]
        checkpoints = [name for name in checkpoints if any(size in name.lower() for size in sizes)] or checkpoints
    if len(checkpoints) == 1:
        return checkpoints[0]
    if checkpoints:
        raise ValueError(f"{ref!r} holds several hypernetworks; append one of {checkpoints} to it.")
    raise ValueError(f"{ref!r} holds neither config.json with model.safetensors nor a .pt file.")


def _download(ref: str, base_model: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    owner, name, *rest = ref.split("/", 2)
    repo_id = f"{owner}/{name}"
    try:
        chosen = rest[0] if rest else choose(_names(repo_id), ref, base_model)
        patterns = [chosen] if chosen else ["config.json", "model.safetensors"]
        return Path(snapshot_download(repo_id, allow_patterns=patterns)) / chosen
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"No file or directory {ref!r} here, and the Hugging Face repository could not be read: "
            + " ".join(str(error).split())
        ) from error


def _names(repo_id: str) -> list[str]:
    """The files of a hub repository or, if the hub cannot be asked, of its snapshot in the cache.

    Raises:
        OSError: the hub cannot be asked, and nothing is in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return [file.rfilename for file in HfApi().model_info(repo_id).siblings or ()]
    except Exception as error:  # also those of the HTTP library, which is another one in each version of the hub's
        try:
            cached = Path(snapshot_download(repo_id, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            raise OSError(str(error)) from error
        return [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
