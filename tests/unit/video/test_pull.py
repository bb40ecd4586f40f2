"""Live sources on this machine, read as they come."""

import asyncio
import functools
import itertools
import operator
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import pytest

from f2l_vllm.server_process import free_port
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import FetchPolicy
from f2l_vllm.video.pull import Puller, PullLimits, check_address
from tests.support.rtsp_source import RtspSource
from tests.support.videos import write_video

LOOPBACK = FetchPolicy(allowed=("127.0.0.1",))
QUICK = PullLimits(read_seconds=5, first_delay=0.01, longest_delay=0.02)
FRAMES, FPS = 120, 10
HANGS = 60  # seconds after which a test fails instead


@pytest.fixture(scope="module")
def transport_stream(tmp_path_factory):
    """12 s of video with a key frame every second."""
    path = tmp_path_factory.mktemp("source") / "a.ts"
    return write_video(path, FRAMES, FPS, options={"g": "10", "sc_threshold": "0", "bf": "2"})


@pytest.fixture(params=["mpegts", "fmp4"])
def hls_folder(request, tmp_path):
    folder = tmp_path / "hls"
    folder.mkdir()
    options = {"hls_time": "2", "hls_list_size": "0", "hls_segment_type": request.param}
    options["hls_fmp4_init_filename"] = "init.mp4"
    path = write_video(
        folder / "a.m3u8", FRAMES, FPS, options={"g": "10", "sc_threshold": "0", "bf": "2"}, container_options=options
    )
    assert "#EXT-X-ENDLIST" in path.read_text()
    return folder


@contextmanager
def served(folder):
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def pull(address, folder, count=None, seconds=4, policy=LOOPBACK, limits=QUICK, on_state=lambda *_: None):
    """The decoded timestamps of each segment, of the first `count` segments or of all."""

    async def run():
        found = []
        puller = Puller(address, seconds, policy, folder, on_state=on_state, limits=limits)
        async with asyncio.timeout(HANGS):
            async for path in puller.segments():
                found.append(times(path))
                path.unlink()
                if len(found) == count:
                    break
        await puller.close()
        return found

    out = asyncio.run(run())
    assert [path for path in folder.iterdir() if path.is_file()] == [] or count is not None
    return out


def times(path):
    """The seconds at which the frames are shown, all decoded; the first is a key frame."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert frames[0].key_frame
    return [round(float(frame.pts * frame.time_base), 3) for frame in frames]


def steps(found):
    return {round(b - a, 2) for a, b in itertools.pairwise(found)}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_hls_is_cut_anew_without_a_frame_lost(hls_folder, out):
    with served(hls_folder) as address:
        found = pull(f"{address}/a.m3u8", out, seconds=2.5)
    assert [len(segment) for segment in found] == [30, 30, 30, 30]  # key frames come every second
    assert steps(functools.reduce(operator.iadd, found, [])) == {0.1}


def test_hls_timestamps_are_those_of_the_source(hls_folder, out):
    first = sorted(hls_folder.glob("a0.*"))[0]
    with served(hls_folder) as address:
        found = pull(f"{address}/a.m3u8", out)
    if first.suffix == ".ts":
        assert found[0][:10] == times(first)[:10]


def test_a_segment_that_is_missing_is_told_and_the_rest_is_read(hls_folder, out):
    sorted(hls_folder.glob("a2.*"))[0].unlink()
    states = []
    with served(hls_folder) as address:
        found = pull(f"{address}/a.m3u8", out, on_state=lambda *state: states.append(state))
    assert sum(map(len, found)) == FRAMES - 20
    assert [why for state, why in states if state == "connected" and why and "could not be read" in why]
    everything = functools.reduce(operator.iadd, found, [])
    assert everything == sorted(everything)


def test_a_live_playlist_is_read_as_it_grows_and_each_segment_once(hls_folder, out):
    playlist = (hls_folder / "a.m3u8").read_text()
    head, *segments = re.split(r"(?=#EXTINF)", playlist.replace("#EXT-X-ENDLIST\n", ""))
    head = re.sub(r"TARGETDURATION:\d+", "TARGETDURATION:0.1", head)
    (hls_folder / "a.m3u8").write_text(head + "".join(segments[:2]))
    grown = []

    async def run(address):
        async def grow():
            for count in range(3, len(segments) + 1):
                (hls_folder / "new").write_text(head + "".join(segments[:count]))
                (hls_folder / "new").rename(hls_folder / "a.m3u8")
                await asyncio.sleep(0.05)
            with (hls_folder / "a.m3u8").open("a") as file:
                file.write("#EXT-X-ENDLIST\n")

        puller = Puller(f"{address}/a.m3u8", 2, LOOPBACK, out, limits=QUICK)
        growing = None
        async for path in puller.segments():
            growing = growing or asyncio.create_task(grow())
            grown.append(times(path))
        await growing

    with served(hls_folder) as address:
        asyncio.run(asyncio.wait_for(run(address), HANGS))
    assert len(functools.reduce(operator.iadd, grown, [])) == FRAMES
    assert steps(functools.reduce(operator.iadd, grown, [])) == {0.1}


def test_hls_names_no_host_that_is_not_allowed(hls_folder, out):
    text = (hls_folder / "a.m3u8").read_text()
    elsewhere = re.sub(r"^(a1\.\w+)$", r"http://127.0.0.2:1/\1", text, flags=re.MULTILINE)
    assert elsewhere != text
    (hls_folder / "a.m3u8").write_text(elsewhere)
    with served(hls_folder) as address, pytest.raises(VideoError) as error:
        pull(f"{address}/a.m3u8", out)
    assert error.value.code == "url_not_allowed"


def test_rtsp_is_read_until_the_source_says_goodbye(transport_stream, out):
    states = []
    with RtspSource(transport_stream) as source:
        found = pull(source.address, out, on_state=lambda *state: states.append(state))
    assert states == [("connecting", None), ("connected", None)]
    assert [len(segment) for segment in found] == [40, 40, 39]  # FFmpeg gives the last frame out when another follows
    assert functools.reduce(operator.iadd, found, []) == times(transport_stream)[:-1]


def test_a_source_that_breaks_off_is_connected_again_and_its_time_goes_on(transport_stream, out):
    states = []
    with RtspSource(transport_stream, goodbye=False) as source:
        found = pull(source.address, out, 7, on_state=lambda *state: states.append(state))
    assert [state for state, _ in states][:4] == ["connecting", "connected", "reconnecting", "connected"]
    assert "closed the connection" in states[2][1]
    everything = functools.reduce(operator.iadd, found, [])
    assert everything == sorted(set(everything))


def test_a_source_that_is_gone_is_found_when_it_is_back(transport_stream, out):
    port = free_port()

    async def run():
        refused = asyncio.Event()
        puller = Puller(
            f"rtsp://127.0.0.1:{port}/live",
            4,
            LOOPBACK,
            out,
            on_state=lambda state, _: refused.set() if state == "reconnecting" else None,
            limits=QUICK,
        )
        segments = puller.segments()
        first = asyncio.create_task(anext(segments))
        await refused.wait()
        with RtspSource(transport_stream, port=port):
            assert times(await first)[0] == times(transport_stream)[0]
            await segments.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("hang_at", ["OPTIONS", "DESCRIBE", "PLAY"])
def test_a_source_that_hangs_is_left(hang_at, transport_stream, out):
    async def run(address):
        left = asyncio.Queue()
        limits = PullLimits(open_seconds=0.5, read_seconds=0.3, first_delay=0.01)
        on_state = lambda state, why: left.put_nowait(why) if state == "reconnecting" else None  # noqa: E731
        puller = Puller(address, 4, LOOPBACK, out, on_state=on_state, limits=limits)
        reading = asyncio.create_task(anext(puller.segments()))
        assert "too long" in await asyncio.wait_for(left.get(), HANGS)
        await puller.close()
        with pytest.raises((StopAsyncIteration, asyncio.CancelledError)):
            await reading

    with RtspSource(transport_stream, hang_at=hang_at) as source:
        asyncio.run(run(source.address))


def test_an_rtsp_redirect_is_not_followed(transport_stream, out):
    async def run(address):
        told = asyncio.Queue()
        on_state = lambda state, why: told.put_nowait(why) if state == "reconnecting" else None  # noqa: E731
        puller = Puller(address, 4, LOOPBACK, out, on_state=on_state, limits=QUICK)
        reading = asyncio.create_task(anext(puller.segments()))
        assert "redirects are not followed" in await asyncio.wait_for(told.get(), HANGS)
        await puller.close()
        with pytest.raises((StopAsyncIteration, asyncio.CancelledError)):
            await reading

    with RtspSource(transport_stream) as elsewhere:
        with RtspSource(transport_stream, redirect=elsewhere.address) as source:
            asyncio.run(run(source.address))
        assert elsewhere.connections == 0


def test_close_ends_the_reading_process(transport_stream, out):
    async def run(address):
        puller = Puller(address, 4, LOOPBACK, out, limits=QUICK)
        segments = puller.segments()
        await anext(segments)
        child = puller._child
        assert child.returncode is None
        await puller.close()
        assert child.returncode is not None
        assert [path async for path in segments if path.suffix != ".ts"] == []

    with RtspSource(transport_stream, hang=True, goodbye=False) as source:
        asyncio.run(run(source.address))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="SRT is read with the program ffmpeg")
def test_srt_is_read_with_ffmpeg(transport_stream, out):
    port = free_port()
    source = subprocess.Popen(
        [
            *("ffmpeg", "-nostdin", "-loglevel", "quiet", "-re", "-i", str(transport_stream), "-c", "copy"),
            *("-copyts", "-muxdelay", "0", "-mpegts_copyts", "1", "-f", "mpegts"),
            f"srt://127.0.0.1:{port}?mode=listener",
        ]
    )
    try:
        found = pull(f"srt://127.0.0.1:{port}", out, 1, seconds=1)
    finally:
        source.kill()
        source.wait()
    assert found[0] == times(transport_stream)[:10]


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("file:///etc/passwd", "unsupported_address"),
        ("rtmp://a/b", "unsupported_address"),
        ("concat:a", "unsupported_address"),
        ("srt://a:1?mode=listener", "unsupported_address"),
        ("srt://a:1?pbkeylen=16&localport=1", "unsupported_address"),
        ("srt://a", "invalid_url"),
        ("rtsp://", "invalid_url"),
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_connected(address, code):
    with pytest.raises(VideoError) as error:
        check_address(address)
    assert error.value.code == code


@pytest.mark.parametrize("address", ["rtsp://127.0.0.2:9/a", "http://127.0.0.2:9/a.m3u8", "rtsps://localhost/a"])
def test_a_host_that_is_not_allowed_is_refused_at_once(address, out):
    with pytest.raises(VideoError) as error:
        pull(address, out)
    assert error.value.code == "url_not_allowed"


def test_a_stream_without_video_is_refused(out, tmp_path):
    from tests.support.videos import write_audio

    with RtspSource(write_audio(tmp_path / "a.ts")) as source, pytest.raises(VideoError) as error:
        pull(source.address, out)
    assert error.value.code == "no_video_stream"
