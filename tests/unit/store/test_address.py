from pathlib import Path

import pytest

from f2l_vllm.settings import Settings
from f2l_vllm.store.address import adapter_name, fingerprint

PARTS = {"video_sha256": "a" * 64, "sampling": {"frames": 8}, "base_revision": "b", "hypernetwork_revision": "h"}


def test_same_parts_same_name():
    assert adapter_name(**PARTS) == adapter_name(**PARTS)
    assert adapter_name(**PARTS).startswith("f2l-")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_changes_the_name(part):
    other = {"frames": 9} if part == "sampling" else "x"
    assert adapter_name(**{**PARTS, part: other}) != adapter_name(**PARTS)


def test_a_rate_of_merging_is_part_of_the_name_and_none_changes_no_name():
    names = {
        rate: adapter_name(**{**PARTS, "sampling": Settings(merge_rate=rate).sampling}) for rate in (0.0, 0.3, 0.5)
    }
    assert len(set(names.values())) == 3
    assert names[0.0] == adapter_name(**{**PARTS, "sampling": {}})


def _model(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_fingerprint_follows_content_not_place(tmp_path):
    weights = bytes(range(256)) * 20_000  # larger than what is hashed whole
    first, copy = _model(tmp_path / "a", weights), _model(tmp_path / "b", weights)
    assert fingerprint(first) == fingerprint(copy)
    changed = bytearray(weights)
    changed[len(weights) // 2 + 10] ^= 1
    assert fingerprint(_model(tmp_path / "c", bytes(changed))) != fingerprint(first)
    (copy / "config.json").write_text('{"other": 1}')
    assert fingerprint(copy) != fingerprint(first)


def test_fingerprint_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        fingerprint(tmp_path)
