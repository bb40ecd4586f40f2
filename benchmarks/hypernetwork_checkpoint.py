"""`python -m benchmarks.hypernetwork_checkpoint`: released checkpoints at full size, from the file to a PEFT adapter.

A random hypernetwork of the released shape is written in the released `.pt` format and read back through the safe
reader; it makes an adapter, whose files are checked against a base model of that shape. Also measured: how long the
configuration alone takes to read, and that a hypernetwork of the other size is refused by name.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.hypernetwork_shapes import SHAPES, Shape, random_hypernetwork, save_released
from f2l_vllm.adapters.peft_format import BaseShapes, validate_adapter
from f2l_vllm.hypernetwork.base_model import check_fit
from f2l_vllm.hypernetwork.model import Hypernetwork, read_config

TOKENS = 800


def main() -> None:
    """Check, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    results = {}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory(prefix="f2l-bench-") as folder:
            results[name] = check(shape, Path(folder))
    record.write(options.json, {"tokens": TOKENS, "weights": "random, bfloat16"}, results)


def check(shape: Shape, folder: Path) -> dict[str, Any]:
    """One shape, from file to files."""
    random = random_hypernetwork(shape.hypernetwork, torch.bfloat16)
    path = save_released(random, folder / "hypernetwork.pt")
    row: dict[str, Any] = {
        "parameters_million": round(sum(p.numel() for p in random.parameters()) / 1e6, 1),
        "file_mb": round(path.stat().st_size / 1e6, 1),
    }
    with Seconds(row, "read_config_s"):
        config = read_config(path)
    with Seconds(row, "load_s"):
        hyper = Hypernetwork.load(path)
    assert config == hyper.config
    assert hyper.config.modules == shape.hypernetwork.modules
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(hyper.parameters(), random.parameters(), strict=True))
    with Seconds(row, "generate_s"):
        factors = hyper.generate(torch.randn(config.num_layers, TOKENS, config.feature_size))
    with Seconds(row, "export_s"):
        hyper.compose([factors]).save(folder / "adapter", base_model=config.base_model)
    (folder / "config.json").write_text(json.dumps({"text_config": shape.text}))
    files = validate_adapter(folder / "adapter", BaseShapes.read(folder), max_rank=2 * config.rank)
    row |= {"adapter_rank": files.rank, "adapter_mb": round(files.bytes / 1e6, 2), "adapter_modules": files.modules}
    row["refusal"] = refusal(shape, next(other for other in SHAPES.values() if other is not shape))
    return row


def refusal(shape: Shape, other: Shape) -> str:
    """What is said when the other size's hypernetwork meets this model."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    with torch.device("meta"):
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(
                vision_config=shape.vision,
                text_config={"model_type": "llama", **shape.text},
                scale_factor=shape.scale_factor,
            )
        )
    model.config._name_or_path = shape.hypernetwork.base_model
    check_fit(model, shape.hypernetwork)
    try:
        check_fit(model, other.hypernetwork)
    except ValueError as error:
        sentence = str(error)
        assert shape.hypernetwork.base_model in sentence
        assert other.hypernetwork.base_model in sentence
        return sentence
    raise AssertionError("a hypernetwork for another model was accepted")


class Seconds:
    """Times a block into `row[name]`."""

    def __init__(self, row: dict[str, Any], name: str) -> None:
        self.row, self.name = row, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_error: object) -> None:
        self.row[self.name] = round(time.perf_counter() - self.started, 3)


if __name__ == "__main__":
    main()
