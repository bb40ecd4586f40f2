"""Videos of this server's own in a prompt: named by an address that nobody else can know, and read where they lie."""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LocalVideo:
    """A file in the store, and what its bytes hash to."""

    path: Path
    sha256: str


_known: ContextVar[dict[str, LocalVideo]] = ContextVar("local_videos", default={})  # noqa: B039  # never changed


def address_of(video: LocalVideo) -> str:
    """An address that `video_at` knows while this request is answered, and in no other one."""
    address = f"f2l-video:{secrets.token_hex(16)}"
    _known.set({**_known.get(), address: video})
    return address


def video_at(address: str) -> LocalVideo | None:
    """The video that this request was given this address for."""
    return _known.get().get(address)
