"""What can be wrong with a video, each with a code that a program can act on."""

from __future__ import annotations

from typing import Literal, get_args

VideoErrorCode = Literal[
    "empty_file",
    "not_a_video",
    "unsupported_codec",
    "no_video_stream",
    "no_frames",
    "truncated_video",
    "video_too_small",
    "video_too_large",
    "video_too_long",
    "file_too_large",
    "decode_failed",
    "video_too_large_to_decode",
    "invalid_url",
    "url_not_allowed",
    "url_unreachable",
    "unsupported_address",
    "unsupported_playlist",
    "invalid_image",
    "image_too_large",
]
CODES: tuple[str, ...] = get_args(VideoErrorCode)


class VideoError(Exception):
    """A video that cannot be used.

    Attributes:
        code: one of `CODES`; stable, for programs.
        message: a sentence for the person who sent the video, saying what to do.
    """

    def __init__(self, code: VideoErrorCode, message: str) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        return (VideoError, (self.code, self.message))  # both arguments must survive a process boundary
