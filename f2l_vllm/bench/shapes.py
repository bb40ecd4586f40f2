"""Models to measure: random weights in the architectures of the released ones, made once and kept; or any other model.

Latency and memory depend on shapes, not on the weights' values. Each random model is a directory like a downloaded
model's, and holds a hypernetwork in this project's format.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from f2l_vllm import models, torch_shims
from f2l_vllm.base_models.registry import DEFAULT

torch_shims.install()

RELEASED = {name.lower(): name for name in DEFAULT.released_sizes}
TINY = "tiny"
NAMES = (TINY, *RELEASED)
_FORMAT = 1  # of the kept models: after a change they are made anew
_LONGEST = 131072  # tokens: 1,024 frames; random weights have no longest sequence


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: for tables.
        model: as `f2l-vllm serve` takes it.
        directory: the model's.
        hypernetwork: file or directory.
        dtype: in which the engine computes.
    """

    name: str
    model: str
    directory: Path
    hypernetwork: Path
    dtype: str


def cache_folder() -> Path:
    """Where random models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2l-vllm" / "shapes"


def of_shape(name: str, folder: Path, dtype: str | None = None) -> Subject:
    """The shipped model, or a random one of a released shape, which is made in `folder` if it is missing.

    Raises:
        ValueError: no such shape.
    """
    if name == TINY:
        return of_model(models.DEFAULT_MODEL, None, dtype, name=TINY)
    if name not in RELEASED:
        raise ValueError(f"no shape {name!r}: give one of {', '.join(NAMES)}, or any model with --model")
    released = DEFAULT.released_sizes[RELEASED[name]]
    directory = folder / f"{released.name.lower()}-random-v{_FORMAT}"
    if not directory.is_dir():
        _make(RELEASED[name], directory)
    return of_model(str(directory), None, dtype, name=name)


def of_model(model: str, hypernetwork: str | None, dtype: str | None = None, name: str | None = None) -> Subject:
    """Any model and hypernetwork, by the names that `f2l-vllm serve` takes.

    Raises:
        ValueError: there is no such model or hypernetwork.
    """
    import torch

    small = model in models.shipped() and not torch.cuda.is_available()
    return Subject(
        name or Path(model).name,
        model,
        models.resolve(model),
        models.resolve_hypernetwork(model, hypernetwork),
        dtype or ("float32" if small else "bfloat16"),
    )


def _make(shape: str, directory: Path) -> None:
    """Write model, tokenizer and hypernetwork, whole or not at all."""
    import torch

    from f2l_vllm.bench import hypernetwork_shapes, suite, tokenizer

    released = hypernetwork_shapes.SHAPES[shape]
    staging = directory.with_name(f".{directory.name}.partial")  # one name: gigabytes that a killed run left go first
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        hypernetwork_shapes.save_model(released, staging)
        questions = [text for one in suite.names() for text in getattr(suite.load(one), "questions", ())]
        tokenizer.build(released.model.text["vocab_size"], questions).save_pretrained(staging)
        config = json.loads((staging / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = _LONGEST
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        hyper = hypernetwork_shapes.random_hypernetwork(released.hypernetwork, torch.bfloat16)
        hyper.save(staging / models.HYPERNETWORK_FOLDER)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
