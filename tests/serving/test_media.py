"""vLLM 0.32 fetches media for a question by this server's rules."""

import asyncio
import inspect
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaIO
from vllm.multimodal.media.connector import MediaConnector

from f2l_vllm.serving import media


class Raw(MediaIO):
    """Media as they come."""

    def load_bytes(self, data):
        return data

    def load_base64(self, media_type, data):
        raise NotImplementedError

    def load_file(self, filepath):
        raise NotImplementedError


@pytest.fixture
def url():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", "/picture")
            self.end_headers()
            self.wfile.write(b"picture")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def connector():
    return MEDIA_CONNECTOR_REGISTRY.load("http", media_io_kwargs=None, allowed_local_media_path="")


def test_vllm_builds_its_connector_by_this_name_and_fetches_through_its_connection():
    from vllm import envs

    assert envs.environment_variables["VLLM_MEDIA_CONNECTOR"]() == media.CONNECTOR
    assert isinstance(connector(), media.GuardedMediaConnector)
    for method in (MediaConnector.load_from_url, MediaConnector.load_from_url_async):
        source = inspect.getsource(method)
        assert "connection.get_bytes(" in source or "connection.async_get_bytes(" in source
        assert source.count("connection = self.connection") == 1


@pytest.mark.parametrize("sync", [True, False])
def test_only_from_where_the_operator_allows_and_without_redirects(url, monkeypatch, sync):
    def load(path):
        if sync:
            return connector().load_from_url(url + path, Raw())
        return asyncio.run(connector().load_from_url_async(url + path, Raw()))

    with pytest.raises(VLLMValidationError, match="F2L_ALLOWED_MEDIA_DOMAINS"):
        load("/picture")
    monkeypatch.setenv("F2L_ALLOWED_MEDIA_DOMAINS", "127.0.0.1")
    assert load("/picture") == b"picture"
    with pytest.raises(VLLMValidationError, match="redirects are not followed"):
        load("/moved")
    monkeypatch.setenv("F2L_MAX_FRAMES_BYTES", "6")  # all of it would be read into memory
    with pytest.raises(VLLMValidationError, match="compress or cut it"):
        load("/picture")
