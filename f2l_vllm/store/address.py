"""Content addresses: an adapter's name says what it was made from, so a name never stands for other weights.

vLLM's prefix cache and LoRA registry know an adapter by its name. If a name were used twice for different weights,
answers would come from another video's cache. The name is therefore a hash over everything that shapes the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from f2l_vllm.video.reading import ReadingOptions

FORMAT_VERSION = 1
ADAPTER_PREFIX = "f2l-"
_SAMPLE = 1 << 20
_WEIGHTS = {".safetensors", ".pt", ".bin"}
_TEXTS = {".json", ".jinja", ".txt", ".model"}


def object_name(address: str, generation: str) -> str:
    """The name in the store of a video, whose address is its hash, or of an adapter: the generation says which copy.
    Catalogs of earlier versions know only the empty generation."""
    return f"{address}.{generation}" if generation else address


def fingerprint(path: Path) -> str:
    """A short content hash of a model or hypernetwork: one file, or a directory's configuration and weight files.

    Configuration files are hashed whole. Of a weight file, its length and its first, middle and last MiB are hashed.
    That tells gigabytes apart in milliseconds. Neither folder nor file times matter.

    Raises:
        FileNotFoundError: `path` does not exist, or is a directory without configuration or weights.
    """
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.glob("*") if p.is_file() and p.suffix in _WEIGHTS | _TEXTS)
    if not files:
        raise FileNotFoundError(f"{path} holds no model: expected config.json and *.safetensors, or a checkpoint file")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if file.suffix in _TEXTS or size <= 3 * _SAMPLE:
                digest.update(stream.read())
                continue
            for offset in (0, size // 2, size - _SAMPLE):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def adapter_name(*, video_sha256: str, reading: ReadingOptions, base_revision: str, hypernetwork_revision: str) -> str:
    """The adapter's name: `f2l-` and 32 hex digits over video bytes, reading options, both revisions, file format."""
    record = {
        "format": FORMAT_VERSION,
        "video": video_sha256,
        "sampling": reading.named,
        "base": base_revision,
        "hypernetwork": hypernetwork_revision,
    }
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return ADAPTER_PREFIX + hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Revisions:
    """What an adapter's name depends on besides the video: content hashes of both models, and how videos are read."""

    base: str
    hypernetwork: str
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    @classmethod
    def of(cls, base: Path, hypernetwork: Path, reading: ReadingOptions) -> Revisions:
        """Those of two directories. Options that are not set come from their files, which the hashes cover."""
        return cls(fingerprint(base), fingerprint(hypernetwork), reading)

    def name(self, sha256: str) -> str:
        """The adapter's content-addressed name for a video with these bytes."""
        return adapter_name(
            video_sha256=sha256,
            reading=self.reading,
            base_revision=self.base,
            hypernetwork_revision=self.hypernetwork,
        )
