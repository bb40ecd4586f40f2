"""Frames by index equal those of a plain decoder, whatever the container, and only what is needed is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from f2l_vllm.video import decode
from f2l_vllm.video.decode import decode_frames, read_timeline
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import probe
from tests.support.videos import picture, rotate_clockwise, write_video

FORMATS: dict[str, dict[str, Any]] = {
    "bframes.mp4": {"frames": 60, "options": {"bf": "3", "g": "12"}},
    "one-gop.mp4": {"frames": 40, "options": {"bf": "2", "g": "1000"}},
    "every-frame-a-keyframe.mp4": {"frames": 20, "options": {"g": "1"}},
    "tiny-gops.mp4": {"frames": 30, "options": {"bf": "2", "g": "2"}},
    "open-gops.mp4": {"frames": 60, "options": {"x264-params": "open-gop=1:keyint=10:bframes=3"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "10"}},
    "variable-rate.mp4": {"frames": 20, "times": [i * i * 10 for i in range(20)]},
    "10-bit-444.mp4": {"frames": 12, "pixel_format": "yuv444p10le"},
    "odd-size.mp4": {"frames": 12, "pixel_format": "yuv444p", "size": (63, 47)},
    "matroska.mkv": {"frames": 50, "options": {"bf": "2", "g": "10"}},
    "vp9.webm": {"frames": 20, "codec": "libvpx-vp9"},
    "mpeg4.avi": {"frames": 30, "codec": "mpeg4"},
    "transport.ts": {"frames": 30, "options": {"bf": "2", "g": "10"}},
    "flash.flv": {"frames": 30, "codec": "flv"},
    "motion-jpeg.mov": {"frames": 10, "codec": "mjpeg", "pixel_format": "yuvj420p"},
}


def plainly_decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(("name", "options"), FORMATS.items(), ids=FORMATS.keys())
def test_frames_equal_a_plain_decoders_in_every_format(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = write_video(tmp_path / name, **options)
    everything = plainly_decoded(path)
    info = probe(path)
    assert info.frame_count == len(everything)
    assert (info.height, info.width) == everything[0].shape[:2]
    indices = sorted({0, 1, len(everything) // 2, len(everything) // 2 + 1, len(everything) - 1})
    expected = np.stack([everything[index] for index in indices])
    for timeline in (read_timeline(path), None):
        frames = decode_frames(path, indices, info.frame_count, timeline)
        assert frames.dtype == np.uint8
        np.testing.assert_array_equal(frames, expected)


def test_indices_count_in_presentation_order(tmp_path: Path) -> None:
    path = write_video(tmp_path / "bars.mp4", frames=40, options={"bf": "3", "g": "12", "crf": "10"})
    indices = list(range(40))
    frames = decode_frames(path, indices, 40, read_timeline(path))
    for index in indices:
        differences = [np.abs(frames[index].astype(int) - picture(other)).mean() for other in indices]
        assert int(np.argmin(differences)) == index


def test_few_frames_of_a_long_video_are_decoded_from_their_keyframes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "long.mp4", frames=400, fps=20, options={"g": "20", "bf": "2"})
    monkeypatch.setattr(decode, "_decode_by_counting", lambda *_: pytest.fail("decoded from the start"))
    frames = decode_frames(path, [0, 200, 399], 400, read_timeline(path))
    np.testing.assert_array_equal(frames, np.stack(plainly_decoded(path))[[0, 200, 399]])


def test_rotation_of_a_phone_is_applied(tmp_path: Path) -> None:
    path = write_video(tmp_path / "phone.mp4", frames=5)
    upright = decode_frames(path, [0, 4], 5, read_timeline(path))
    rotate_clockwise(path)
    rotated = decode_frames(path, [0, 4], 5, read_timeline(path))
    np.testing.assert_array_equal(rotated, np.rot90(upright, -1, axes=(1, 2)))
    assert rotated.flags["C_CONTIGUOUS"]


def test_a_frame_missing_at_the_very_end_is_replaced_by_the_last_one(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", frames=20)
    for timeline in (read_timeline(path), None):
        frames = decode_frames(path, [0, 19, 21], 22, timeline)
        np.testing.assert_array_equal(frames[1], frames[2])
        with pytest.raises(VideoError) as caught:
            decode_frames(path, [0, 39], 40, timeline)
        assert caught.value.code == "truncated_video"
