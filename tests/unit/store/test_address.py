from pathlib import Path

import pytest

from f2l_vllm.settings import Settings
from f2l_vllm.store.address import adapter_name, fingerprint
from f2l_vllm.video.reading import ReadingOptions

PARTS = {
    "video_sha256": "a" * 64,
    "reading": ReadingOptions(max_frames=8),
    "base_revision": "b",
    "hypernetwork_revision": "h",
}


def test_same_parts_same_name():
    assert adapter_name(**PARTS) == adapter_name(**PARTS)
    assert adapter_name(**PARTS).startswith("f2l-")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_changes_the_name(part):
    other = ReadingOptions(max_frames=9) if part == "reading" else "x"
    assert adapter_name(**{**PARTS, part: other}) != adapter_name(**PARTS)


def test_a_rate_of_merging_is_part_of_the_name_and_none_changes_no_name():
    names = {rate: adapter_name(**{**PARTS, "reading": Settings(merge_rate=rate).reading}) for rate in (0.0, 0.3, 0.5)}
    assert len(set(names.values())) == 3
    assert names[0.0] == adapter_name(**{**PARTS, "reading": ReadingOptions()})


NAMES = {  # stored adapters are found under these
    "f2l-541e7b62f3014256a118bd581faed2ec": {},
    "f2l-df87ba940a2a91feb59bf269717b977f": {"max_frames": 8, "fps": 0.5, "chunk_seconds": 10, "merge_rate": 0.3},
    "f2l-5580f648d18373d5429217f477189322": {"chunk_frames": 16, "merge_rate": 0.5, "max_chunks": 15},
}


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_over_versions(name):
    reading = Settings(**NAMES[name]).reading
    assert name == adapter_name(**{**PARTS, "reading": reading, "base_revision": "b1", "hypernetwork_revision": "h2"})


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
