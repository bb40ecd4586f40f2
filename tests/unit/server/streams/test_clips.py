"""Clips of streams that are longer than any upload may be."""

import pytest

from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.server.streams.clips import write_clip
from f2l_vllm.settings import Settings
from f2l_vllm.video.decoder import IsolatedDecoder
from f2l_vllm.video.errors import VideoError
from tests.support.videos import write_video

DAY = 86400.0


@pytest.fixture
def decoder():
    decoder = IsolatedDecoder()
    yield decoder
    decoder.close()


@pytest.mark.parametrize("days", [1, 64])
def test_a_clip_of_days_is_written_read_by_workers_and_made_longer(tmp_path, decoder, days):
    settings = Settings(home=tmp_path, max_video_seconds=5)
    limits = WorkerSpec.of(settings, model=tmp_path, hypernetwork=tmp_path, rank=1, max_rank=2).limits
    source = write_video(tmp_path / "short.mp4", frames=8, fps=4)
    clip, longer = tmp_path / "clip.mp4", tmp_path / "longer.mp4"
    half, whole = days * DAY / 2, days * DAY
    write_clip([(source, 0.0, half), (source, half, whole)], clip, decoder, settings.video_limits, 16)
    with pytest.raises(VideoError, match="at most 5 seconds"):
        decoder.open(clip, settings.video_limits)
    info = decoder.open(clip, limits)
    assert info.frame_count == 16
    assert info.duration_s == pytest.approx(whole, rel=0.1)  # its last frame is shown for an instant
    write_clip([(clip, 0.0, whole), (clip, whole, 2 * whole)], longer, decoder, limits, 16)
    assert decoder.open(longer, limits).duration_s == pytest.approx(2 * whole, rel=0.1)
