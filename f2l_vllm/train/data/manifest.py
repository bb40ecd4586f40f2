"""Manifests: JSONL files that list what is asked about which video and what the answer should be.

One example a line, in the layout that Frames2LoRA published: `id, video_path, prompt, target_text, task_type, dataset,
split, metadata`. Relative video paths are relative to the manifest's folder. An example about a span of its video has
`start` and `end`, in seconds of the video, in its metadata. `docs/data.md` shows one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from f2l_vllm.files import atomic_path

_MAY_BE_EMPTY = ("target_text",)  # an example whose answer `f2l-vllm targets` has yet to write
_FOREVER_S = 1e9  # beyond the end of any video; comparing with it also refuses infinity and NaN
_PUBLISHED_EXTRAS = ("clip_start_sec", "clip_end_sec")  # where a clip that is a file of its own was cut from


@dataclass(frozen=True)
class Example:
    """One question about one video, or about a span of it.

    Attributes:
        id: unique within a manifest.
        video_path: a local file; absolute when read from a manifest.
        prompt: what the user asks.
        target_text: the answer to learn; empty where a teacher has yet to write it.
        task_type: e.g. `caption`, or the world's question types; scores are given for each.
        dataset: where the example comes from.
        split: e.g. `train`, `validation`, `test`, `held-out`.
        metadata: anything else, as JSON holds it; `start` and `end` are a span in seconds.
    """

    id: str
    video_path: Path
    prompt: str
    target_text: str
    task_type: str
    dataset: str
    split: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def span(self) -> tuple[float, float] | None:
        """(start, end) in seconds of the video, or None for the whole of it.

        Raises:
            ValueError: only one of the two, or not 0 <= start < end.
        """
        start, end = self.metadata.get("start"), self.metadata.get("end")
        if start is None and end is None:
            return None
        for name, second in (("start", start), ("end", end)):
            if isinstance(second, bool) or not isinstance(second, int | float) or not abs(second) < _FOREVER_S:
                raise ValueError(
                    f"metadata.{name} is {second!r}; a span needs start and end, both in seconds. Give both, or "
                    "neither for the whole video."
                )
        assert start is not None
        assert end is not None
        if not 0 <= start < end:
            raise ValueError(f"metadata.start is {start!r} and metadata.end is {end!r}; a span needs 0 <= start < end.")
        return float(start), float(end)


_FIELDS = tuple(field.name for field in fields(Example))


def read_manifest(path: str | Path, split: str | None = None) -> list[Example]:
    """Read all examples, or those of one split; video files are not looked at.

    Raises:
        ValueError: a line is not an example, an id is repeated, or there are none; names file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a JSONL manifest, as 'f2l-vllm manifest' writes them.")
    examples = list(parse_lines(path))
    if not examples:
        raise ValueError(f"{path} holds no example; write one JSON object a line.")
    return of_split(examples, split, path)


def of_split(examples: list[Example], split: str | None, where: str | Path) -> list[Example]:
    """The examples of a split, or all of them. Raises ValueError if there are none."""
    if split is None:
        return examples
    chosen = [example for example in examples if example.split == split]
    if not chosen:
        splits = ", ".join(sorted({example.split for example in examples}))
        raise ValueError(f"{where} has no example of split {split!r}; choose one of {splits}.")
    return chosen


def parse_lines(path: Path) -> Iterator[Example]:
    """The examples of a manifest, one after the other; blank lines are passed over.

    Raises:
        ValueError: as `read_manifest`.
    """
    folder = Path(os.path.abspath(path.parent))
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                example = _parse(line)
                if example.id in seen:
                    raise ValueError(
                        f"field id: {example.id!r} is also the id of line {seen[example.id]}; give every line its own."
                    )
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            seen[example.id] = number
            yield replace(example, video_path=Path(os.path.normpath(folder / example.video_path)))


def check_ids(examples: Iterable[Example], where: str | Path) -> None:
    """Raise ValueError if an id is repeated."""
    seen = set[str]()
    for example in examples:
        if example.id in seen:
            raise ValueError(f"{where}: two examples have the id {example.id!r}; give every example its own.")
        seen.add(example.id)


def write_manifest(path: str | Path, examples: Iterable[Example]) -> None:
    """Write a manifest whole or not at all; videos inside its folder are named relative to it, so both can move.

    Raises:
        ValueError: a repeated id.
    """
    path, seen = Path(path), set[str]()

    def rows() -> Iterator[dict[str, Any]]:
        for example in examples:
            if example.id in seen:
                raise ValueError(f"Two examples have the id {example.id!r}; give every example its own.")
            seen.add(example.id)
            yield to_row(example, path.parent)

    write_jsonl(path, rows())


def to_row(example: Example, folder: Path) -> dict[str, Any]:
    """The JSON object of an example in a manifest that lies in `folder`."""
    video = Path(os.path.abspath(example.video_path))
    here = Path(os.path.abspath(folder))
    name = str(video.relative_to(here) if video.is_relative_to(here) else video)
    return {name_: getattr(example, name_) for name_ in _FIELDS} | {"video_path": name}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line to a file that appears whole or not at all; folders are made."""
    with atomic_path(path) as staging, staging.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _parse(line: bytes) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); write one JSON object a line, in UTF-8.") from error
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object with the fields {', '.join(_FIELDS)}.")
    return parse_row(row)


def parse_row(row: dict[str, Any]) -> Example:
    """The example of a JSON object, which is emptied. Raises ValueError that names the field."""
    metadata = row.pop("metadata", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"field metadata: {metadata!r} is not an object; write {{}} where there is nothing to say.")
    metadata = {name: row.pop(name) for name in _PUBLISHED_EXTRAS if name in row} | metadata
    texts = {name: _text(row, name) for name in _FIELDS if name != "metadata"}
    if row:
        name = next(iter(row))
        raise ValueError(f"field {name}: unknown; put it into metadata, or correct its name ({', '.join(_FIELDS)}).")
    example = Example(video_path=Path(texts.pop("video_path")), metadata=metadata, **texts)
    try:
        _ = example.span
    except ValueError as error:
        raise ValueError(f"field {error}") from error
    return example


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"field {name}: missing; every line needs {', '.join(_FIELDS[:-1])}.")
    value = row.pop(name)
    if not isinstance(value, str):
        raise ValueError(f"field {name}: {value!r} is not a string.")
    if not value.strip() and name not in _MAY_BE_EMPTY:
        raise ValueError(f"field {name}: empty; say what it is.")
    if "\0" in value and name == "video_path":
        raise ValueError("field video_path: holds a zero byte; name a file.")
    return value
