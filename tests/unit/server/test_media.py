"""vLLM fetches and decodes media for a question by this server's rules."""

import asyncio
import base64
import inspect
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.connector import MediaConnector
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from f2l_vllm.server.errors import APIError
from f2l_vllm.server.media import connector as media
from f2l_vllm.server.media.turns import Turns
from f2l_vllm.server.tenants import asking_tenant
from f2l_vllm.settings import current
from tests.unit.video.test_picture import bomb


def png(width, height=1):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(file, "PNG")
    return file.getvalue()


def data_uri(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


answering = threading.Event()


@pytest.fixture
def url():
    answering.clear()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow":
                answering.wait(60)
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", "/picture")
            self.end_headers()
            self.wfile.write(png(5))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def operator(monkeypatch):
    """`operator(name, value)` sets one of the server's variables."""

    def set_variable(name, value):
        monkeypatch.setenv(name, value)
        current.cache_clear()

    current.cache_clear()
    yield set_variable
    current.cache_clear()


def connector():
    return MEDIA_CONNECTOR_REGISTRY.load("http", media_io_kwargs=None, allowed_local_media_path="")


def code_of(load):
    with pytest.raises(APIError) as error:
        load()
    assert "/tmp" not in error.value.message
    return error.value.code


def test_vllm_builds_its_connector_by_this_name_and_all_it_reads_comes_here():
    from vllm import envs

    assert envs.environment_variables["VLLM_MEDIA_CONNECTOR"]() == media.CONNECTOR
    assert isinstance(connector(), media.GuardedMediaConnector)
    own = vars(media.GuardedMediaConnector)
    for name, method in vars(MediaConnector).items():
        if name.startswith("fetch_") and "embedding" in name:
            assert name in own, name
        elif name.startswith("fetch_"):
            assert "self.load_from_url" in inspect.getsource(method), name
    assert {name for name in vars(MediaConnector) if name.startswith("load_")} <= set(own)


@pytest.mark.parametrize("sync", [True, False])
def test_only_from_where_the_operator_allows_and_without_redirects(url, operator, sync):
    def load(path):
        if sync:
            return connector().fetch_image(url + path)
        return asyncio.run(connector().fetch_image_async(url + path))

    assert code_of(lambda: load("/picture")) == "url_not_allowed"
    operator("F2L_ALLOWED_MEDIA_DOMAINS", "127.0.0.1")
    assert load("/picture").media.size == (5, 1)
    assert code_of(lambda: load("/moved")) == "url_unreachable"
    operator("F2L_MAX_IMAGE_BYTES", "6")
    assert code_of(lambda: load("/picture")) == "file_too_large"


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("file:///etc/passwd", "url_not_allowed"),
        ("/etc/passwd", "url_not_allowed"),
        ("data:image/png;base64,!!", "invalid_url"),
        ("data:image/png;base64", "invalid_url"),
        ("data:image/png,no%20picture", "invalid_image"),
        (data_uri(b"GIF89a"), "invalid_image"),
        (data_uri(bomb(8000, 7000)), "image_too_large"),
    ],
)
def test_what_is_no_picture_is_refused(address, code):
    assert code_of(lambda: asyncio.run(connector().fetch_image_async(address))) == code


def test_frames_are_decoded_as_a_video_whatever_their_address_calls_them(monkeypatch):
    """vLLM itself would read `video/jpeg` as pictures, in its own process."""
    monkeypatch.setattr(media, "_frames", lambda path, media_io: (path.read_bytes(), type(media_io)))
    address = data_uri(png(3), "video/jpeg")
    assert asyncio.run(connector().fetch_video_async(address)) == (png(3), VideoMediaIO)


def test_sound_and_embeddings_are_refused():
    address = data_uri(b"RIFF")
    assert code_of(lambda: connector().load_from_url(address, AudioMediaIO())) == "unsupported_part"
    for name in ("image", "audio", "video"):
        assert code_of(lambda: getattr(connector(), f"fetch_{name}_embedding")("AAAA")) == "unsupported_part"  # noqa: B023


def test_the_pixels_of_a_question_are_counted_together(operator):
    operator("F2L_MAX_IMAGE_PIXELS", "100")

    async def load(widths):
        with media.question():
            return await asyncio.gather(*(connector().fetch_image_async(data_uri(png(width))) for width in widths))

    assert len(asyncio.run(load([50, 50]))) == 2
    assert code_of(lambda: asyncio.run(load([50, 51]))) == "image_too_large"


def test_a_question_holds_its_place_to_its_end_and_not_while_it_fetches(url, monkeypatch, operator):
    operator("F2L_ALLOWED_MEDIA_DOMAINS", "127.0.0.1")
    turns = Turns(1)
    monkeypatch.setattr(media, "_turns", lambda: turns)

    async def ask(*addresses, decoded=None, end=None):
        with media.question():
            await asyncio.gather(*(connector().fetch_image_async(address) for address in addresses))
            if decoded is not None:
                decoded.set()
                await end.wait()

    async def run():
        slow = asyncio.create_task(ask(data_uri(png(1)), f"{url}/slow"))
        await asyncio.sleep(0.2)
        await ask(data_uri(png(1)))
        assert not slow.done()
        answering.set()
        await slow
        decoded, end = asyncio.Event(), asyncio.Event()
        holding = asyncio.create_task(ask(data_uri(png(1)), decoded=decoded, end=end))
        await decoded.wait()
        waiting = asyncio.create_task(ask(data_uri(png(1))))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        end.set()
        await asyncio.gather(holding, waiting)

    asyncio.run(run())


def test_a_client_that_leaves_gives_its_place_back_when_its_work_has_ended(monkeypatch):
    turns, release = Turns(1), threading.Event()
    monkeypatch.setattr(media, "_turns", lambda: turns)

    async def leave():
        with media.question():
            await media._question.get().decode(release.wait)

    async def run():
        left = asyncio.create_task(leave())
        await asyncio.sleep(0.1)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        next_one = asyncio.create_task(turns.take("b"))
        await asyncio.sleep(0.1)
        held = not next_one.done()
        release.set()
        await asyncio.wait_for(next_one, 5)
        return held

    assert asyncio.run(run())


def test_what_vllm_keeps_of_a_picture_is_the_tenants_own_unless_the_operator_shares(operator, tmp_path):
    """vLLM's caches of processed media and its prefixes go by the hash of `original_bytes`."""
    from vllm.multimodal.hasher import MultiModalHasher

    def key(tenant, width=3):
        asking_tenant.set(tenant)
        item = asyncio.run(connector().fetch_image_async(data_uri(png(width))))
        assert np.array_equal(item.media, ImageMediaIO().load_bytes(png(width)).media)
        return MultiModalHasher.hash_kwargs("blake3", image=item)

    try:
        assert key("a") == key("b") != key("a", 4)
        operator("F2L_TENANTS", str(tmp_path / "tenants.json"))
        assert key("a") == key("a") != key("b")
        operator("F2L_SHARE_CACHES", "1")
        assert key("a") == key("b")
    finally:
        asking_tenant.set("default")
