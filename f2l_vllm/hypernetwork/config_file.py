"""Reads a hypernetwork's shape from its files, without its weights."""

from __future__ import annotations

from pathlib import Path

from f2l_vllm.files import read_json
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.locate import locate

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "f2l-hypernetwork-1"


def read_config(ref: str | Path, base_model: str | None = None) -> HypernetworkConfig:
    """The shape of what `Hypernetwork.load` would read at `ref`, without reading its weights. Raises like it."""
    path = locate(ref, base_model)
    if path.is_dir():
        return read_directory_config(path)
    from f2l_vllm.hypernetwork.checkpoint import read_checkpoint_config  # loads torch

    return read_checkpoint_config(path)


def read_directory_config(directory: Path) -> HypernetworkConfig:
    """The shape of a hypernetwork in this project's own format.

    Raises:
        ValueError: a file is damaged, or has another format.
    """
    try:
        values = read_json(directory / CONFIG_FILE)
    except ValueError as error:
        raise damaged(directory / CONFIG_FILE, error) from error
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        raise ValueError(f"{directory / CONFIG_FILE} has format {found!r}, expected {FORMAT!r}: not a hypernetwork.")
    return HypernetworkConfig.from_dict(values)


def damaged(path: Path, error: Exception) -> ValueError:
    """The error for a file that cannot be read; its message says what to do."""
    return ValueError(
        f"{path} cannot be read ({error}): it is damaged or was not copied to its end. Copy or download it again."
    )
