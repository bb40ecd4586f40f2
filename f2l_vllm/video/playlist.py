"""HLS playlists (RFC 8216): which segments there are, and where. Nothing is fetched here."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from f2l_vllm.video.errors import VideoError

_MOST_LINES = 50_000
_LONGEST_ADDRESS = 8192
_MOST_SEQUENCE = 1 << 63
_SMALLEST_HEIGHT = 320  # pixels: what the base models look at is no larger
_ATTRIBUTE = re.compile(r'([A-Z0-9-]+)=("[^"]*"|[^",]*)(?:,|$)')


@dataclass(frozen=True)
class HlsSegment:
    """A file of a media playlist.

    Attributes:
        sequence: its number in the stream.
        address: absolute.
        seconds: as the playlist says.
        header: the address of its initialisation section; None for MPEG-TS.
        new_clock: its timestamps do not continue those of the segment before it.
    """

    sequence: int
    address: str
    seconds: float
    header: str | None
    new_clock: bool


@dataclass(frozen=True)
class MediaPlaylist:
    """Attributes: `target` is the longest segment in seconds; `ended` says that no segment will follow."""

    segments: tuple[HlsSegment, ...]
    first_sequence: int
    target: float
    ended: bool


@dataclass(frozen=True)
class Variant:
    """One of several renditions; `height` in pixels is None when the playlist does not say it."""

    address: str
    bandwidth: int
    height: int | None


def parse_playlist(text: str, address: str) -> MediaPlaylist | list[Variant]:
    """Read the playlist that was found at `address`: a media playlist, or the variants of a master playlist.

    Raises:
        VideoError: `unsupported_playlist`.
    """
    lines = [stripped for line in text.removeprefix("\ufeff").splitlines() if (stripped := line.strip())]
    if not lines or lines[0].split(maxsplit=1)[0] != "#EXTM3U":
        raise _refuse("it does not begin with #EXTM3U")
    if len(lines) > _MOST_LINES:
        raise _refuse(f"it has more than {_MOST_LINES} lines")
    if any(line.startswith("#EXT-X-STREAM-INF:") for line in lines):
        return _variants(lines, address)
    try:
        return _media(lines, address)
    except (ValueError, OverflowError) as error:
        raise _refuse(f"a number in it cannot be read ({str(error)[:80]})") from error


def choose(variants: list[Variant]) -> Variant:
    """The cheapest that is large enough, or the cheapest of those that do not say how large they are."""
    large = [variant for variant in variants if variant.height is None or variant.height >= _SMALLEST_HEIGHT]
    return min(large or variants, key=lambda variant: variant.bandwidth)


def _variants(lines: list[str], address: str) -> list[Variant]:
    found = []
    for line, after in itertools.pairwise(lines):
        if not line.startswith("#EXT-X-STREAM-INF:") or after.startswith("#"):
            continue
        attributes = _attributes(line)
        bandwidth = attributes.get("BANDWIDTH", "")
        height = re.fullmatch(r"\d{1,6}x(\d{1,6})", attributes.get("RESOLUTION", ""))
        found.append(
            Variant(
                _absolute(after, address),
                int(bandwidth) if re.fullmatch(r"\d{1,18}", bandwidth) else 0,
                int(height[1]) if height else None,
            )
        )
    if not found:
        raise _refuse("it names no variant")
    return found


def _media(lines: list[str], address: str) -> MediaPlaylist:
    segments: list[HlsSegment] = []
    first, target, ended = 0, 0.0, False
    header: str | None = None
    seconds: float | None = None
    new_clock = False
    for line in lines[1:]:
        tag, _, value = line.partition(":")
        if not line.startswith("#"):
            if seconds is None:
                raise _refuse("a segment has no #EXTINF")
            at = _absolute(line, address)
            segments.append(HlsSegment(first + len(segments), at, seconds, header, new_clock))
            seconds, new_clock = None, False
        elif tag == "#EXTINF":
            seconds = _positive(value.split(",")[0])
        elif tag == "#EXT-X-TARGETDURATION":
            target = _positive(value)
        elif tag == "#EXT-X-MEDIA-SEQUENCE":
            if segments or not 0 <= (first := int(value)) < _MOST_SEQUENCE:
                raise ValueError(value[:20])
        elif tag == "#EXT-X-DISCONTINUITY":
            new_clock = True
        elif tag == "#EXT-X-ENDLIST":
            ended = True
        elif tag == "#EXT-X-MAP":
            attributes = _attributes(line)
            if "BYTERANGE" in attributes or not attributes.get("URI"):
                raise _refuse("it gives byte ranges of files")
            header = _absolute(attributes["URI"], address)
        elif tag == "#EXT-X-KEY" and _attributes(line).get("METHOD") != "NONE":
            raise _refuse("it is encrypted")
        elif tag == "#EXT-X-BYTERANGE":
            raise _refuse("it gives byte ranges of files")
        elif tag == "#EXT-X-I-FRAMES-ONLY":
            raise _refuse("it has key frames only")
    if target <= 0:
        raise _refuse("it has no #EXT-X-TARGETDURATION")
    return MediaPlaylist(tuple(segments), first, target, ended)


def _attributes(line: str) -> dict[str, str]:
    return {name: value.strip('"') for name, value in _ATTRIBUTE.findall(line.partition(":")[2])}


def _positive(text: str) -> float:
    number = float(text)
    if not 0 <= number < 86400:
        raise ValueError(text[:20])
    return number


def _absolute(address: str, base: str) -> str:
    if len(address) > _LONGEST_ADDRESS:
        raise _refuse("an address in it is too long")
    joined = urljoin(base, address)
    if urlsplit(joined).scheme not in ("http", "https"):
        raise _refuse("it names an address that is neither http nor https")
    return joined


def _refuse(why: str) -> VideoError:
    return VideoError(
        "unsupported_playlist",
        f"The HLS playlist cannot be read: {why}. Give one with whole, unencrypted MPEG-TS or fragmented MP4 segments.",
    )
