"""Stored videos in a prompt: named by an address that nobody else can know, and read directly from the store."""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LocalVideo:
    """A file in the store, and the hash of its bytes."""

    path: Path
    sha256: str


_known: ContextVar[dict[str, LocalVideo]] = ContextVar("local_videos", default={})  # noqa: B039  # never changed


def address_of(video: LocalVideo) -> str:
    """A new address for the video. `video_at` knows it only within this request."""
    address = f"f2l-video:{secrets.token_hex(16)}"
    _known.set({**_known.get(), address: video})
    return address


def video_at(address: str) -> LocalVideo | None:
    """The video behind an address that `address_of` made for this request."""
    return _known.get().get(address)
