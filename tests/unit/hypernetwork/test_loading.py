"""Hypernetworks are saved whole, found by what a user types, and named by what they hold."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.config_file import read_config
from f2l_vllm.hypernetwork.locate import locate
from f2l_vllm.hypernetwork.model import Hypernetwork

GOLDEN = Path(__file__).parent / "golden" / "hypernetwork.pt"
CONFIG = HypernetworkConfig(
    base_model="test/model",
    num_layers=2,
    feature_size=6,
    modules={"down_proj": (10, 6), "up_proj": (6, 10)},
    rank=2,
    latent_size=8,
    num_blocks=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_frames=5,
)


def make() -> Hypernetwork:
    torch.manual_seed(0)
    return Hypernetwork(CONFIG)


def test_saved_and_loaded_weights_and_config_are_the_same(tmp_path: Path) -> None:
    hyper = make()
    hyper.save(tmp_path / "fp32")
    hyper.save(tmp_path / "bf16", dtype=torch.bfloat16)
    exact, rounded = Hypernetwork.load(tmp_path / "fp32"), Hypernetwork.load(tmp_path / "bf16")
    assert exact.config == rounded.config == CONFIG
    for name, tensor in hyper.state_dict().items():
        assert torch.equal(exact.state_dict()[name], tensor)
        assert torch.equal(rounded.state_dict()[name], tensor.bfloat16().float())
    assert Hypernetwork.load(tmp_path / "bf16", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in exact.parameters())
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert {tensor.dtype for tensor in Hypernetwork.load(tmp_path / name, dtype=None).parameters()} == {dtype}


def test_revision_changes_with_every_weight_and_size_and_with_nothing_else(tmp_path: Path) -> None:
    hyper = make()
    revision = hyper.revision
    assert len(revision) == 16
    hyper.save(tmp_path / "copy")
    assert Hypernetwork.load(tmp_path / "copy").revision == revision
    renamed = HypernetworkConfig.from_dict(CONFIG.to_dict() | {"base_model": "/elsewhere"})
    assert Hypernetwork.from_tensors(renamed, hyper.state_dict()).revision == revision
    rescaled = HypernetworkConfig.from_dict(CONFIG.to_dict() | {"scale": 1.0})
    assert Hypernetwork.from_tensors(rescaled, hyper.state_dict()).revision != revision
    with torch.no_grad():
        hyper.scaler_B["up_proj"][0, 1, 1, 0] += 1e-3
    assert hyper.revision != revision


def test_saving_refuses_broken_weights_and_replaces_only_when_told(tmp_path: Path) -> None:
    hyper = make()
    hyper.save(tmp_path / "h")
    with pytest.raises(FileExistsError, match="not empty"):
        hyper.save(tmp_path / "h")
    with torch.no_grad():
        hyper.head.weight.fill_(0.5)
    hyper.save(tmp_path / "h", overwrite=True)
    assert (Hypernetwork.load(tmp_path / "h").head.weight == 0.5).all()
    with torch.no_grad():
        hyper.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite.*head\.weight"):
        hyper.save(tmp_path / "h", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["h"]


def test_a_directory_without_or_with_another_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither"):
        Hypernetwork.load(tmp_path)
    make().save(tmp_path / "h")
    (tmp_path / "h" / "config.json").write_text('{"model_type": "smolvlm"}')
    with pytest.raises(ValueError, match="not a hypernetwork"):
        Hypernetwork.load(tmp_path / "h")
    with pytest.raises(ValueError, match="No hypernetwork at '/nowhere/at/all'"):
        Hypernetwork.load("/nowhere/at/all")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_not_copied_to_its_end_is_named(name: str, part: float, tmp_path: Path) -> None:
    make().save(tmp_path / "h")
    path = tmp_path / "h" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=rf"h/{name} cannot be read .*Copy or download it again"):
        Hypernetwork.load(tmp_path / "h")


def test_among_several_checkpoints_the_one_for_the_base_model_is_taken(tmp_path: Path) -> None:
    for size in ("500m", "2.2b"):
        shutil.copy(GOLDEN, tmp_path / f"frames2lora-smolvlm2-{size}-best-ce.pt")
    assert "2.2b" in locate(tmp_path, "HuggingFaceTB/SmolVLM2-2.2B-Instruct").name
    assert "500m" in locate(tmp_path, "HuggingFaceTB/SmolVLM2-500M-Video-Instruct").name
    with pytest.raises(ValueError, match="several hypernetworks"):
        locate(tmp_path, "owner/unknown")
    with pytest.raises(ValueError, match="several hypernetworks"):
        locate(tmp_path)


def test_a_hub_reference_downloads_only_the_chosen_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    names = ["README.md", "a-500m.pt", "b-2.2b.pt"]
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        shutil.copy(GOLDEN, tmp_path / allow_patterns[0])
        return str(tmp_path)

    held = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id: held)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert Hypernetwork.load("owner/ckpts", base_model="x/SmolVLM2-500M").config.rank == 4
    assert asked == {"repo_id": "owner/ckpts", "patterns": ["a-500m.pt"]}
    assert locate("owner/ckpts/b-2.2b.pt") == tmp_path / "b-2.2b.pt"


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_args: object, **_kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(ValueError, match=r"No file or directory 'owner/ckpts' here.*no route to host"):
        Hypernetwork.load("owner/ckpts")


def test_the_config_is_read_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save(tmp_path / "h")
    (tmp_path / "h" / "model.safetensors").write_bytes(b"not read")
    assert read_config(tmp_path / "h") == CONFIG
    expected = Hypernetwork.load(GOLDEN).config
    read: list[str] = []
    real = zipfile.ZipFile.read

    def watched(archive: zipfile.ZipFile, name: str, *rest: Any) -> bytes:
        read.append(name)
        return real(archive, name, *rest)

    monkeypatch.setattr(zipfile.ZipFile, "read", watched)
    assert read_config(GOLDEN) == expected
    assert sum(zipfile.ZipFile(GOLDEN).getinfo(name).file_size for name in read) < 100_000 < GOLDEN.stat().st_size
    with pytest.raises(ValueError, match="No hypernetwork"):
        read_config("/nowhere/at/all")
