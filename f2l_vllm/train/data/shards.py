"""Videos in tar files, in the layout of webdataset: `KEY.mp4` beside `KEY.json`, which holds what is asked about it.

Only the texts are read beforehand. A video is fetched by its place in the tar file when a step draws it, so a set need
not fit a disk, and what a step draws depends on the seed, the step and the process alone, as with files.

Source of the layout: https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path, PurePosixPath
from typing import IO, Any

from f2l_vllm.train.data.manifest import Example, check_ids, of_split, parse_row, read_manifest

_log = logging.getLogger(__name__)
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi")
_PLACE = "shard"  # the entry of an example's metadata: where its video is
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_AT_ONCE = 16  # shards whose texts are read
_BLOCK = 1 << 16  # bytes that are read of a remote tar file at once, to find its files
_WAITS_S = (1.0, 4.0, 16.0)  # before another try to fetch a video


def read_examples(name: str, split: str | None = None) -> list[Example]:
    """The examples of a manifest, or of tar files: `shards-{000000..000099}.tar`, a path or an address.

    Raises:
        ValueError: as `read_manifest` and `read_shards`.
    """
    return read_shards(name, split) if name.endswith(".tar") else read_manifest(name, split)


def read_shards(pattern: str, split: str | None = None) -> list[Example]:
    """The examples of tar files, or those of one split; no video is read.

    A JSON file is an object with the fields of a manifest's line, or a list of such objects. `video_path` is not
    looked at; `id`, `dataset` and `split` may be left out.

    Raises:
        ValueError: a tar file cannot be read, or what it holds are not examples; names tar file, JSON file and field.
    """
    shards = expand(pattern)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        examples = [example for some in pool.map(_read, shards) for example in some]
    if not examples:
        raise ValueError(f"{pattern} holds no example: a video KEY.mp4 needs a KEY.json beside it.")
    check_ids(examples, pattern)
    return of_split(examples, split, pattern)


def expand(pattern: str) -> list[str]:
    """The names that braces stand for: `{000..011}` counts with as many digits, `{a,b}` are alternatives.

    Raises:
        ValueError: braces that are neither.
    """
    choices = []
    for inside in _BRACES.findall(pattern):
        ends = _RANGE.fullmatch(inside)
        if ends is None and "," not in inside:
            raise ValueError(
                f"{pattern}: {{{inside}}} is no range such as {{000000..000099}}, and no list such as {{a,b}}."
            )
        numbers = range(int(ends[1]), int(ends[2]) + 1) if ends else ()
        choices.append([str(n).zfill(len(ends[1])) for n in numbers] if ends else inside.split(","))
    between = _BRACES.split(pattern)[::2]
    rest = between[1:]
    return [between[0] + "".join(map("".join, zip(words, rest, strict=True))) for words in product(*choices)]


@contextmanager
def video_file(example: Example) -> Iterator[Path]:
    """Within the block, the example's video is a file: its own, or a temporary one with what is fetched of a tar file.

    Raises:
        ValueError: the tar file cannot be reached, or has been changed.
    """
    place = example.metadata.get(_PLACE)
    if not isinstance(place, dict) or set(place) != {"name", "offset", "size"}:
        yield example.video_path
        return
    content = _fetch(**place)
    with tempfile.NamedTemporaryFile(prefix="f2l-", suffix=example.video_path.suffix) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def _read(shard: str) -> list[Example]:
    name = shard if "://" in shard else os.path.abspath(shard)
    videos: dict[str, tuple[str, dict[str, Any]]] = {}
    texts: dict[str, bytes] = {}
    try:
        with _open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                key, _, kind = path.name.partition(".")
                key = str(path.with_name(key)) if key else ""
                if not key or not member.isfile():
                    continue
                if kind == "json":
                    found = tar.extractfile(member)
                    assert found is not None
                    texts[key] = found.read()
                elif kind.lower() in VIDEOS:
                    videos[key] = (member.name, {"name": name, "offset": member.offset_data, "size": member.size})
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} is no plain tar file, or is cut off ({error}): shards are not compressed."
        ) from error
    except Exception as error:  # of whatever library reads such an address
        raise ValueError(f"{shard} cannot be read: {error or type(error).__name__}") from error
    alone = sorted(videos.keys() ^ texts.keys())
    if alone:
        _log.warning("%s: left out, with no video or no JSON file of the name: %s", shard, ", ".join(alone[:10]))
    return [example for key in videos if key in texts for example in _examples(name, key, *videos[key], texts[key])]


def _examples(shard: str, key: str, member: str, place: dict[str, Any], text: bytes) -> Iterator[Example]:
    name = f"{PurePosixPath(shard).stem}/{key}"
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{shard}, {key}.json: not JSON ({error}).") from error
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{shard}, {key}.json: neither an object nor a list of objects.")
        given = {"id": name if len(rows) == 1 else f"{name}-{number}", "dataset": "shards", "split": "train"}
        try:
            example = parse_row(given | row | {"video_path": f"{shard}/{member}"})
        except ValueError as error:
            raise ValueError(f"{shard}, {key}.json: {error}") from error
        yield replace(example, metadata=example.metadata | {_PLACE: place})


def _open(name: str) -> IO[bytes]:
    if "://" not in name:
        return Path(name).open("rb")
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(name)
    file: IO[bytes] = filesystem.open(path, "rb", block_size=_BLOCK, cache_type="readahead")
    return file


def _fetch(name: str, offset: int, size: int) -> bytes:
    for wait in (*_WAITS_S, None):
        try:
            content = _range(name, offset, size)
            break
        except Exception as error:  # of whatever library reads such an address
            if wait is None or "://" not in name or isinstance(error, FileNotFoundError):
                raise ValueError(
                    f"{name} cannot be read: {error or type(error).__name__}. When it can be reached, the same command "
                    "goes on."
                ) from error
            time.sleep(wait)
    if len(content) != size:
        raise ValueError(
            f"{name} gives {len(content)} bytes in place of {size}: it has changed, or cannot give a part."
        )
    return content


def _range(name: str, offset: int, size: int) -> bytes:
    if "://" not in name:
        with Path(name).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(name)
    content: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
    return content
