"""What senders of live video put: playlists, headers and segments, told apart by their bytes.

Source: RFC 8216 (HTTP Live Streaming), ISO/IEC 14496-12 (boxes of MP4 files).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path

LONGEST_INIT = 1 << 16
_LONGEST_PLAYLIST = 1 << 20
_BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"sidx", b"mdat", b"free", b"emsg", b"prft")


class Kind(Enum):
    """`INIT`: the header that the fragments of an MP4 need. `FRAGMENT`: one of those. `SEGMENT`: a whole video."""

    PLAYLIST = "playlist"
    INIT = "init"
    FRAGMENT = "fragment"
    SEGMENT = "segment"


def kind_of(path: Path) -> Kind:
    """What a file is, by its bytes."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"#EXTM3U"):
        return Kind.PLAYLIST
    if head[4:8] not in _BOXES:
        return Kind.SEGMENT
    boxes = set(_boxes(path))
    if b"moov" not in boxes:
        return Kind.FRAGMENT if b"moof" in boxes else Kind.SEGMENT
    return Kind.SEGMENT if boxes & {b"moof", b"mdat"} else Kind.INIT


def ends(playlist: Path) -> bool:
    """Whether a playlist says that no segment follows."""
    with playlist.open("rb") as file:
        return any(line.strip() == b"#EXT-X-ENDLIST" for line in file.read(_LONGEST_PLAYLIST).splitlines())


def _boxes(path: Path) -> Iterator[bytes]:
    """The types of a file's outer boxes."""
    with path.open("rb") as file:
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[:4], "big")
            yield head[4:]
            if size == 1:
                size = int.from_bytes(file.read(8), "big") - 8
            if size < 8:  # it goes on to the end, or makes no sense
                return
            file.seek(size - 8, 1)
