"""Options that several commands take. Those that set a setting have its name, bounds and words from `Settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from annotated_types import Ge, Gt

from f2l_vllm.models import SAMPLE_VIDEO
from f2l_vllm.settings import Settings

_ABOVE_ZERO = 0.001  # typer knows no open bounds

DEFAULT_MODEL = "f2l-tiny"
Model = Annotated[str, typer.Option("--model", help="Shipped model, directory, or hub id.")]


def video_file(word: str) -> Path:
    """The file that a user means by a path, or by `sample` where no file has that name."""
    path = SAMPLE_VIDEO if word == "sample" and not Path(word).exists() else Path(word)
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {word!r}; 'sample' is a video that comes with this package")
    return path


Video = Annotated[
    Path, typer.Argument(parser=video_file, metavar="VIDEO", help="Video file, or 'sample': one that comes along.")
]


def sets(name: str, **more: Any) -> Any:
    """The option that sets `Settings.<name>`; `more` is what else typer should know."""
    field = Settings.model_fields[name]
    match field.metadata:  # a field with an upper bound is checked by `Settings` alone
        case [Ge() as bound]:
            more["min"] = bound.ge
        case [Gt()]:
            more["min"] = _ABOVE_ZERO
    flag = name.replace("_", "-")
    return typer.Option(f"--{flag}" + f"/--no-{flag}" * (field.annotation is bool), help=field.description, **more)


Hypernetwork = Annotated[str | None, sets("hypernetwork")]
MaxFrames = Annotated[int | None, sets("max_frames")]
Fps = Annotated[float | None, sets("fps")]
ChunkSeconds = Annotated[float | None, sets("chunk_seconds")]
ChunkFrames = Annotated[int | None, sets("chunk_frames")]
MaxChunks = Annotated[int, sets("max_chunks")]
MergeRate = Annotated[float, sets("merge_rate")]


def api_url(url: str) -> str:
    """The URL of a server's API; adds the version if the given URL lacks it."""
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
