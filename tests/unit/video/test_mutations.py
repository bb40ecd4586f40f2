"""Real videos with bytes changed at random: an error about the video or a video, nothing else; always the same ones."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from f2l_vllm.video.decoder import DecodeLimits, IsolatedDecoder
from f2l_vllm.video.errors import CODES, VideoError
from f2l_vllm.video.probe import Limits
from tests.support.videos import write_video

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
LIMITS = Limits(max_bytes=1 << 24, max_duration_s=3600, max_pixels=1 << 22, max_frames=10_000)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    kinds = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4"}
    return [write_video(folder / f"v.{kind}", frames=8, codec=codec).read_bytes() for kind, codec in kinds.items()]


@pytest.fixture(scope="module")
def decoder():
    decoder = IsolatedDecoder(DecodeLimits(memory_bytes=1 << 30, seconds=20, output_bytes=1 << 28))
    yield decoder
    decoder.close()


@st.composite
def mutations(draw):
    """Which original, how much of it, and what is written where (as fractions of its length)."""
    at = st.floats(0, 1, exclude_max=True)
    number = st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1000, 0x10000])
    words = st.lists(st.tuples(at, number), max_size=6)
    bits = st.lists(st.tuples(at, st.integers(0, 7)), max_size=30)
    return draw(st.integers(0, 3)), draw(st.one_of(st.just(1.0), at)), draw(words), draw(bits)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=SLOW_IS_FINE)
@given(mutations())
def test_a_changed_file_is_read_or_refused(originals, decoder, tmp_path_factory, mutation):
    which, kept, words, bits = mutation
    data = bytearray(originals[which])
    for where, value in words:
        struct.pack_into(">I", data, int(where * (len(data) - 4)), value)
    for where, bit in bits:
        data[int(where * len(data))] ^= 1 << bit
    path = tmp_path_factory.mktemp("mutated") / "video"
    path.write_bytes(data[: int(len(data) * kept)])
    outcome = outcome_of(decoder, path)
    assert outcome == "read" or outcome in CODES


def outcome_of(decoder, path):
    """`read`, or the code of the error."""
    try:
        info = decoder.open(path, LIMITS)
        assert info.frame_count > 0
        assert 0 < info.width * info.height <= LIMITS.max_pixels
        indices = sorted({0, info.frame_count // 2, info.frame_count - 1})
        assert decoder.frames(path, indices, info.frame_count).shape[0] == len(indices)
    except VideoError as error:
        return error.code
    return "read"
