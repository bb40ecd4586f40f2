"""Decoding in another process: the same frames, and whatever happens there is an error about the video, no more."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from f2l_vllm.video.decode import decode_frames, read_timeline
from f2l_vllm.video.decoder import DecodeLimits, Decoders, DecoderStopped, IsolatedDecoder
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import Limits
from f2l_vllm.video.sample import open_source
from tests.support.videos import hide_first_second, write_video

INDICES = [0, 3, 3, 17, 29]


@pytest.fixture(scope="module")
def decoder():
    decoder = IsolatedDecoder()
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4")


@pytest.fixture
def stuck(tmp_path):
    """A video that never comes: whoever opens it waits for ever, without CPU time. Returns a link to it."""
    os.mkfifo(tmp_path / "fifo")
    link = tmp_path / "stuck.mp4"
    link.symlink_to(tmp_path / "fifo")
    return link


def pid_of(decoder):
    return decoder._process.pid


def works(decoder, video):
    return np.array_equal(decoder.frames(video, INDICES, 30), decode_frames(video, INDICES, 30))


@pytest.mark.parametrize("kind", ["mp4", "webm", "trimmed"])
def test_the_frames_are_those_of_this_process(decoder, tmp_path, kind):
    path = write_video(
        tmp_path / f"v.{kind.replace('trimmed', 'mp4')}", codec="libvpx" if kind == "webm" else "libx264"
    )
    if kind == "trimmed":
        hide_first_second(path)
    here, there = open_source(path, Limits()), open_source(path, Limits(), decoder)
    assert there.info == here.info
    indices = [0, 3, 3, here.info.frame_count - 1]
    expected = decode_frames(path, indices, here.info.frame_count, read_timeline(path))
    assert np.array_equal(decoder.frames(path, indices, there.info.frame_count), expected)


def test_one_process_reads_many_videos(decoder, video, tmp_path):
    assert works(decoder, video)
    before = pid_of(decoder)
    for path, code in ((tmp_path / "text.mp4", "not_a_video"), (tmp_path / "half.mp4", "truncated_video")):
        path.write_bytes(b"no video" * 100 if code == "not_a_video" else video.read_bytes()[:2000])
        for ask in (decoder.open, decoder.probe):
            with pytest.raises(VideoError) as error:
                ask(path, Limits())
            assert error.value.code == code
    with pytest.raises(FileNotFoundError):
        decoder.open(tmp_path / "nothing.mp4", Limits())
    with pytest.raises(VideoError, match="at most"):
        decoder.probe(video, Limits(max_frames=10))
    assert works(decoder, video)
    assert pid_of(decoder) == before


def test_names_of_any_kind(decoder, video, tmp_path):
    for name in ("ünïcode 视频.mp4", 'quo"te\n.mp4', b"\xff\xfe.mp4"):
        path = tmp_path / (os.fsdecode(name) if isinstance(name, bytes) else name)
        path.write_bytes(video.read_bytes())
        assert decoder.frames(path, [0], 30).shape == (1, 48, 64, 3)


@pytest.mark.parametrize(
    "ask",
    [
        lambda decoder, path: decoder.open(path, Limits()),
        lambda decoder, path: decoder.frames(path, INDICES, 30),
        lambda decoder, path: decoder.picture(path, 1 << 20, (0, 0, 0)),
    ],
    ids=["open", "frames", "picture"],
)
def test_a_file_deleted_before_it_is_opened_is_missing_and_no_bad_video(decoder, video, tmp_path, monkeypatch, ask):
    path = tmp_path / "going.mp4"
    path.write_bytes(video.read_bytes())
    in_process = IsolatedDecoder._ask_process

    def after_its_deletion(self, *arguments):
        path.unlink(missing_ok=True)
        return in_process(self, *arguments)

    monkeypatch.setattr(IsolatedDecoder, "_ask_process", after_its_deletion)
    with pytest.raises(FileNotFoundError):
        ask(decoder, path)
    assert works(decoder, video)


def test_more_than_it_may_put_out(video):
    decoder = IsolatedDecoder(DecodeLimits(output_bytes=4 * 64 * 48 * 3))
    assert decoder.frames(video, [0, 1, 2, 3], 30).shape == (4, 48, 64, 3)
    with pytest.raises(VideoError, match="may decode to") as error:
        decoder.frames(video, [0, 1, 2, 3, 4], 30)
    assert error.value.code == "video_too_large_to_decode"
    decoder.close()


def test_more_memory_than_it_has(video, tmp_path):
    large = write_video(tmp_path / "large.mp4", frames=2, size=(1920, 1080), options={"preset": "ultrafast"})
    decoder = IsolatedDecoder(DecodeLimits(memory_bytes=600 << 20))
    for _ in range(2):
        with pytest.raises(VideoError, match="memory") as error:
            decoder.frames(large, [0] * 100, 2)
        assert error.value.code == "video_too_large_to_decode"
        assert works(decoder, video)
    decoder.close()


def test_more_time_than_it_has(video, stuck):
    decoder = IsolatedDecoder(DecodeLimits(seconds=0.5))
    for ask in (lambda: decoder.probe(stuck, Limits()), lambda: decoder.frames(stuck, [0], 1)):
        with pytest.raises(VideoError, match="longer to decode") as error:
            ask()
        assert error.value.code == "video_too_large_to_decode"
    assert works(decoder, video)
    decoder.close()


def test_the_process_has_its_limits(video):
    decoder = IsolatedDecoder(DecodeLimits(memory_bytes=1 << 30, seconds=40))
    assert works(decoder, video)
    lines = Path(f"/proc/{pid_of(decoder)}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[0] for line in lines}
    assert limits["Max address space"] == str(1 << 30)
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert 40 <= int(limits["Max cpu time"]) <= 60  # what it has used, and 40 s more
    decoder.close()


def during(decoder, stuck, act):
    """What `frames` of a video that never comes raises or returns when `act` happens in the middle of it."""
    decoder.open(write_video(stuck.parent / "ready.mp4", frames=2), Limits())  # the process runs
    timer = threading.Timer(0.3, act)
    timer.start()
    try:
        return decoder.frames(stuck, [0, 1], 30)
    finally:
        timer.join()


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGSEGV, "decode_failed"), (signal.SIGXCPU, "video_too_large_to_decode")]
)
def test_a_crash_and_too_much_cpu_time_are_the_videos_fault(decoder, video, stuck, sent, code):
    with pytest.raises(VideoError) as error:
        during(decoder, stuck, lambda: os.kill(pid_of(decoder), sent))
    assert error.value.code == code
    assert works(decoder, video)


def test_a_process_killed_by_another_is_replaced_once(decoder, video, stuck):
    first = []

    def kill():
        stuck.unlink()
        stuck.symlink_to(video)
        first.append(pid_of(decoder))
        os.kill(first[0], signal.SIGKILL)

    assert during(decoder, stuck, kill).shape == (2, 48, 64, 3)
    assert pid_of(decoder) != first[0]
    os.kill(pid_of(decoder), signal.SIGKILL)  # while it has nothing to do
    assert works(decoder, video)


def test_one_that_is_killed_again_is_an_error(decoder, video, stuck):
    def kill():
        first = pid_of(decoder)
        os.kill(first, signal.SIGKILL)
        while decoder._process is None or pid_of(decoder) == first:
            time.sleep(0.01)
        os.kill(pid_of(decoder), signal.SIGKILL)

    with pytest.raises((VideoError, RuntimeError)):  # the second may not even have started
        during(decoder, stuck, kill)
    assert works(decoder, video)


def test_stop_ends_what_is_in_work_and_nothing_else(decoder, video, stuck):
    assert works(decoder, video)
    before = pid_of(decoder)
    decoder.stop()
    assert works(decoder, video)
    assert pid_of(decoder) == before
    with pytest.raises(DecoderStopped):
        during(decoder, stuck, decoder.stop)
    assert works(decoder, video)


@pytest.mark.parametrize(
    "answer",
    [
        b"not json\n",
        b"[]\n",
        b'{"shape": [1, 2, 2, 4]}\n',
        b'{"shape": [5, 1000000, 1000000, 3]}\n',
        b'{"shape": [5, -1, 2, 3]}\n',
        b'{"code": "made_up", "message": ""}\n',
        b"longer than a line may be",
    ],
)
def test_a_decoder_that_a_video_took_over_is_not_believed(monkeypatch, video, answer):
    program = (
        "import sys\n"
        "out = sys.stdout.buffer\n"
        "out.write(b'{}\\n'); out.flush()\n"
        f"answer = {answer!r}\n"
        "sys.stdin.readline(); out.write(answer if answer[-1:] == b'\\n' else b'x' * (1 << 17)); out.flush()\n"
        "sys.stdin.read()"
    )
    start = subprocess.Popen
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda _command, **how: start([sys.executable, "-c", program], **how))
        decoder = IsolatedDecoder()
        with pytest.raises(VideoError) as error:
            decoder.frames(video, INDICES, 30)
        assert error.value.code == "decode_failed"
    assert works(decoder, video)
    decoder.close()


def test_it_dies_with_its_parent_even_in_the_middle_of_a_video(video, stuck):
    program = (
        "import sys\n"
        "from f2l_vllm.video.decoder import IsolatedDecoder\n"
        "from f2l_vllm.video.probe import Limits\n"
        "decoder = IsolatedDecoder()\n"
        "decoder.probe(sys.argv[1], Limits())\n"
        "print(decoder._process.pid, flush=True)\n"
        "decoder.frames(sys.argv[2], [0], 1)\n"
    )
    command = [sys.executable, "-c", program, str(video), str(stuck)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_lent_to_one_at_a_time(video):
    decoders = Decoders(2, DecodeLimits())
    with decoders.lend() as one, decoders.lend() as two:
        assert one is not two
    with decoders.lend() as again:
        assert works(again, video)
        last = again
    with decoders.lend() as again:
        assert again is last
    for decoder in (one, two):
        decoder.close()
