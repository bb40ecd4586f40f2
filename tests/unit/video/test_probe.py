"""Every kind of bad file gets its own code and a sentence that says what to do."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from f2l_vllm.video.errors import CODES, VideoError
from f2l_vllm.video.probe import Limits, probe
from f2l_vllm.video.sample import Sampling, sample_video
from tests.support.videos import patch_header, write_audio, write_video


class EvenSampler:
    """Stands for a processor: samples evenly, as SmolVLM's does for a short video."""

    num_frames, fps = 4, 1

    def sample_frames(self, metadata: object, num_frames: int, fps: float) -> np.ndarray:
        return np.linspace(0, metadata.total_num_frames - 1, num_frames, dtype=int)


PROCESSOR = SimpleNamespace(video_processor=EvenSampler())


def text_file(path: Path) -> Path:
    path.write_text("These are only words, whatever the name of the file says.\n" * 20)
    return path


def playlist(path: Path) -> Path:
    """A playlist names other files; read as a video it would leak them."""
    secret = write_video(path.parent / "secret.ts", frames=10)
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n")
    return path


def concat_script(path: Path) -> Path:
    secret = write_video(path.parent / "secret.mp4", frames=10)
    path.write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
    return path


def picture_file(path: Path) -> Path:
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(path, format=path.suffix[1:])
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def cut(path: Path, share: float, **options: object) -> Path:
    write_video(path, frames=60, options={"crf": "1"}, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def with_index_in_front(path: Path) -> Path:
    return cut(path, 0.5, container_options={"movflags": "faststart"})


def unknown_codec(path: Path) -> Path:
    data = write_video(path, frames=5).read_bytes()
    path.write_bytes(data.replace(b"avc1", b"zzzz"))
    return path


def no_samples(path: Path) -> Path:
    """A video track whose tables list no frame."""
    write_video(path, frames=5)
    for box, offset in ((b"stts", 4), (b"stsz", 8), (b"stsc", 4), (b"stco", 4), (b"stss", 4), (b"ctts", 4)):
        if box in path.read_bytes():
            patch_header(path, box, offset, b"\0\0\0\0")
    return path


def tiny(path: Path) -> Path:
    return write_video(path, frames=5, codec="mpeg4", size=(1, 1))


def huge_duration(path: Path) -> Path:
    """A table of times that claims hours for each of five frames."""
    return patch_header(write_video(path, frames=5), b"stts", 12, struct.pack(">I", 2**28))


def huge_frames(path: Path) -> Path:
    """65,000 pixels a side in the header, which is written in three lines of a text format."""
    frame = b"FRAME\n"
    path.write_bytes(b"YUV4MPEG2 W65000 H65000 F25:1 C420\n" + frame)
    return path


def wide(path: Path) -> Path:
    return write_video(path, frames=2, size=(4096, 16))


BAD: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "empty file": ("a.mp4", empty, "empty_file"),
    "text named mp4": ("a.mp4", text_file, "not_a_video"),
    "png": ("a.png", picture_file, "not_a_video"),
    "jpeg": ("a.jpeg", picture_file, "not_a_video"),
    "gif": ("a.gif", picture_file, "not_a_video"),
    "webp": ("a.webp", picture_file, "not_a_video"),
    "hls playlist": ("a.mp4", playlist, "not_a_video"),
    "concat script": ("a.mp4", concat_script, "not_a_video"),
    "mp4 cut short, index at the end": ("a.mp4", lambda path: cut(path, 0.5), "truncated_video"),
    "mp4 cut short, index in front": ("a.mp4", with_index_in_front, "truncated_video"),
    "mp4 of a hundred bytes": ("a.mp4", lambda path: cut(path, 0.002), "truncated_video"),
    "audio only": ("a.mp4", write_audio, "no_video_stream"),
    "codec nobody knows": ("a.mp4", unknown_codec, "unsupported_codec"),
    "no frames": ("a.mp4", no_samples, "no_frames"),
    "one pixel": ("a.avi", tiny, "video_too_small"),
    "days in the header": ("a.mp4", huge_duration, "video_too_long"),
    "raw video in an unknown container": ("a.y4m", huge_frames, "not_a_video"),
}


@pytest.mark.parametrize(("name", "make", "code"), BAD.values(), ids=BAD.keys())
def test_bad_file_gets_its_code_and_a_helpful_sentence(
    name: str, make: Callable[[Path], Path], code: str, tmp_path: Path
) -> None:
    path = make(tmp_path / name)
    with pytest.raises(VideoError) as caught:
        sample_video(path, PROCESSOR)
    assert caught.value.code == code, caught.value
    assert caught.value.message.endswith(".")
    assert str(tmp_path) not in caught.value.message


def test_webm_cut_short_still_gives_what_it_holds(tmp_path: Path) -> None:
    """A container that states no number of frames cannot contradict itself; its beginning is a video."""
    path = write_video(tmp_path / "a.webm", frames=30, codec="libvpx", options={"b:v": "2M"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    sampled = sample_video(path, PROCESSOR)
    assert 5 < sampled.info.frame_count < 30


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "nowhere.mp4")


LIMITS = {
    "file_too_large": Limits(max_bytes=100),
    "video_too_long": Limits(max_duration_s=2.5),
    "video_too_large": Limits(max_pixels=3000),
    "video_too_small": Limits(min_side=50),
}


@pytest.mark.parametrize(("code", "limits"), LIMITS.items(), ids=LIMITS.keys())
def test_limits_are_kept(code: str, limits: Limits, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=30, fps=10)
    assert len(sample_video(path, PROCESSOR).frames) == 4
    with pytest.raises(VideoError) as caught:
        sample_video(path, PROCESSOR, limits)
    assert caught.value.code == code


def test_too_many_frames_are_too_long_even_when_the_duration_is_not(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=30, fps=10)
    with pytest.raises(VideoError, match="30 frames") as caught:
        sample_video(path, PROCESSOR, Limits(max_frames=29))
    assert caught.value.code == "video_too_long"


def test_a_wide_frame_within_the_limits_is_read(tmp_path: Path) -> None:
    assert sample_video(wide(tmp_path / "a.mp4"), PROCESSOR).frames.shape == (4, 16, 4096, 3)


def test_names_that_look_like_addresses_are_files(tmp_path: Path) -> None:
    path = write_video(tmp_path / "concat:a|b #1 %20.mp4", frames=5)
    assert probe(path).frame_count == 5


def test_header_facts(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "a.mp4", frames=45, fps=15, size=(80, 32)))
    assert (info.frame_count, info.width, info.height, info.codec) == (45, 80, 32, "h264")
    assert info.fps == pytest.approx(15.0)
    assert info.duration_s == pytest.approx(3.0)


@pytest.mark.parametrize("code", CODES)
def test_errors_survive_a_process_boundary(code) -> None:
    error = pickle.loads(pickle.dumps(VideoError(code, "Nothing there.")))
    assert (error.code, error.message, str(error)) == (code, "Nothing there.", "Nothing there.")


@pytest.mark.parametrize("values", [{"max_frames": 0}, {"fps": -1.0}, {"longest_edge": 0}])
def test_sampling_and_limits_must_be_positive(values: dict) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Sampling(**values)
    with pytest.raises(ValueError, match="must be positive"):
        Limits(max_bytes=0)
