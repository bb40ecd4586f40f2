"""Frames decoded before their job begins are that job's, and so are their errors."""

import threading

import pytest

from f2l_vllm.pool.ahead import VideoReader
from f2l_vllm.video.decoder import DecoderStopped
from f2l_vllm.video.errors import VideoError

WAIT_SECONDS = 60


class Decoding:
    """Stands for the decoder's process: notes what is asked, and hangs over some videos until it is stopped."""

    def __init__(self):
        self.asked, self.hangs, self.errors, self.refused = [], set(), {}, set()
        self.began, self.ended, self.stops = threading.Event(), threading.Event(), 0
        self.reader = VideoReader(
            lambda video: self.decode(video, "own"), lambda video: self.decode(video, "ahead"), self.stop
        )

    def decode(self, video, how):
        self.asked.append((video, how))
        if (video, how) in self.hangs:
            self.ended.clear()
            self.began.set()
            assert self.ended.wait(WAIT_SECONDS)
            raise DecoderStopped
        if (video, how) in self.errors:
            raise self.errors[video, how]
        return None if (video, how) in self.refused else f"frames of {video}"

    def stop(self):
        self.stops += 1
        self.ended.set()


@pytest.fixture
def decoding():
    return Decoding()


def taken(decoding, video):
    return decoding.reader.take(video).frames


def test_a_video_decoded_ahead_is_decoded_once(decoding):
    decoding.reader.begin("a")
    decoding.reader.begin("a")
    assert taken(decoding, "a") == "frames of a"
    assert decoding.asked == [("a", "ahead")]
    assert taken(decoding, "a") == "frames of a"
    assert decoding.asked == [("a", "ahead"), ("a", "own")]


def test_another_job_gets_its_own_frames_and_the_next_one_still_those_ahead(decoding):
    decoding.reader.begin("a")
    assert taken(decoding, "b") == "frames of b"
    assert taken(decoding, "a") == "frames of a"
    assert decoding.asked == [("a", "ahead"), ("b", "own")]


def test_a_bad_video_is_an_error_of_its_own_job_alone(decoding):
    decoding.errors["a", "ahead"] = VideoError("no_frames", "nothing in it")
    decoding.reader.begin("a")
    assert taken(decoding, "b") == "frames of b"
    with pytest.raises(VideoError, match="nothing in it"):
        decoding.reader.take("a")
    assert decoding.asked == [("a", "ahead"), ("b", "own")]


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), MemoryError(), RuntimeError("the process did not start")])
def test_what_fails_ahead_for_another_reason_is_decoded_again(decoding, error):
    decoding.errors["a", "ahead"] = error
    decoding.reader.begin("a")
    assert taken(decoding, "a") == "frames of a"
    assert decoding.asked == [("a", "ahead"), ("a", "own")]


def test_what_has_to_wait_for_its_job_is_decoded_then(decoding):
    decoding.refused.add(("a", "ahead"))
    decoding.reader.begin("a")
    assert taken(decoding, "a") == "frames of a"
    assert decoding.asked == [("a", "ahead"), ("a", "own")]


def test_at_most_one_is_ahead_and_a_dropped_one_is_stopped(decoding):
    decoding.hangs.add(("a", "ahead"))
    decoding.reader.begin("a")
    assert decoding.began.wait(WAIT_SECONDS)
    decoding.reader.begin("b")
    assert decoding.stops
    assert taken(decoding, "b") == "frames of b"
    assert taken(decoding, "a") == "frames of a"
    assert decoding.asked == [("a", "ahead"), ("b", "ahead"), ("a", "own")]


def test_frames_that_are_not_kept_are_let_go(decoding):
    decoding.reader.begin("a")
    decoding.reader.keep(["a", "b"])
    assert taken(decoding, "a") == "frames of a"
    decoding.reader.begin("a")
    decoding.reader.keep(["b"])
    assert taken(decoding, "a") == "frames of a"
    assert decoding.asked[-1] == ("a", "own")


@pytest.mark.parametrize("how", ["own", "ahead"])
def test_a_job_stopped_over_its_video_ends_and_the_next_one_goes_on(decoding, how):
    decoding.hangs.add(("a", how))
    if how == "ahead":
        decoding.reader.begin("a")
    outcome = []

    def take():
        with pytest.raises(DecoderStopped) as stopped:
            decoding.reader.take("a")
        outcome.append(stopped)

    job = threading.Thread(target=take)
    job.start()
    assert decoding.began.wait(WAIT_SECONDS)
    decoding.reader.stop("b")
    assert not outcome
    while job.is_alive():  # it may not wait for its frames yet
        decoding.reader.stop("a")
        job.join(0.01)
    assert outcome
    assert taken(decoding, "b") == "frames of b"


def test_a_stop_that_comes_late_ends_no_other_video(decoding):
    decoding.hangs.add(("b", "own"))
    frames = []

    def take():
        frames.append(taken(decoding, "b"))

    job = threading.Thread(target=take)
    job.start()
    assert decoding.began.wait(WAIT_SECONDS)
    decoding.hangs.clear()
    decoding.stop()  # was meant for the video before
    job.join(WAIT_SECONDS)
    assert frames == ["frames of b"]
    assert decoding.asked == [("b", "own"), ("b", "own")]
