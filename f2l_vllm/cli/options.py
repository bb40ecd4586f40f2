"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_MODEL = "f2l-tiny"
Model = Annotated[str, typer.Option("--model", help="Shipped model, directory, or hub id.")]
Hypernetwork = Annotated[
    str | None,
    typer.Option("--hypernetwork", help="Directory, released .pt file, or hub id; default: the model's own."),
]

MaxFrames = Annotated[int | None, typer.Option(min=1, help="Frames read of a video or chunk; default: as trained.")]
Fps = Annotated[float | None, typer.Option(min=0.001, help="Frames read per second, up to --max-frames.")]
ChunkSeconds = Annotated[float | None, typer.Option(min=0.001, help="Cut videos into chunks of this many seconds.")]
ChunkFrames = Annotated[int | None, typer.Option(min=1, help="Cut videos into chunks of this many frames.")]
MergeRate = Annotated[
    float | None, typer.Option(help="Part of a video's visual tokens to merge away before it is internalized.")
]
_MAX_CHUNKS = "Most chunks of a video (each adds to the LoRA rank); default: serve 3, internalize 15."
MaxChunks = Annotated[int | None, typer.Option(min=1, help=_MAX_CHUNKS)]
