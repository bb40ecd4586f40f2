"""Videos by address: only from where the operator allows, never into private networks, never more than the cap."""

import asyncio
import base64
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from f2l_vllm.video import fetch as module
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import FetchPolicy, fetch

BODY = bytes(range(256)) * 1000


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        getattr(self, self.path.strip("/").replace("-", "_"))()

    def video(self, claimed=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY) if claimed is None else claimed))
        self.end_headers()
        self.wfile.write(BODY)

    def too_short(self):
        self.video(claimed=len(BODY) + 5)
        self.close_connection = True

    def too_long(self):
        self.video(claimed=len(BODY) - 5)
        self.close_connection = True

    def boasting(self):
        self.video(claimed=1 << 40)
        self.close_connection = True

    def endless(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

    def slow(self):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def moved(self):
        self.send_response(302)
        self.send_header("Location", "/video")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def missing(self):
        self.send_error(404)

    def rubbish(self):
        self.wfile.write(b"this is not HTTP\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving(address="127.0.0.1", context=None):
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

        def handle_error(self, *_):  # clients that hang up are what is tested
            pass

    server = Server((address, 0), Handler)
    server.seen = []
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def web():
    with serving() as server:
        yield server


@pytest.fixture
def names(monkeypatch):
    """Names that exist for a test: name -> the addresses of the first look-up, the second …; and what was asked."""
    known, asked = {}, []
    original = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in known:
            return original(host, port, *args, **kwargs)
        answers = known[host]
        found = answers[min(asked.count(host), len(answers) - 1)]
        asked.append(host)
        family = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in found]
        return [(kind, socket.SOCK_STREAM, 6, "", (one, port)) for kind, one in zip(family, found, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known, asked


def get(url, target, **policy):
    asyncio.run(fetch(url, target, FetchPolicy(**policy)))
    return target.read_bytes()


def refused(url, target, code, **policy):
    with pytest.raises(VideoError) as error:
        get(url, target, **policy)
    assert error.value.code == code
    assert not target.exists()
    return error.value.message


def test_a_host_that_is_allowed(web, tmp_path, names):
    names[0]["videos.test"] = [["127.0.0.1"]]
    url = f"http://videos.test:{web.server_port}/video"
    assert get(url, tmp_path / "v", allowed=("videos.test", "127.0.0.1")) == BODY
    assert web.seen[-1] == ("/video", f"videos.test:{web.server_port}")
    assert get(f"http://127.0.0.1:{web.server_port}/video", tmp_path / "v", allowed=("127.0.0.0/8",)) == BODY
    assert get(url.replace("videos.test", "VIDEOS.test."), tmp_path / "v", allowed=("videos.test", "127.0.0.1")) == BODY


def test_ipv6(tmp_path):
    with serving("::1") as server:
        assert get(f"http://[::1]:{server.server_port}/video", tmp_path / "v", allowed=("::1",)) == BODY


def test_a_host_that_is_not_allowed_is_not_connected_to(web, tmp_path):
    before = len(web.seen)
    for allowed in ((), ("example.com",), ("127.0.0.2", "localhost.example.com")):
        for host in ("127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]", "example.com@127.0.0.1"):
            url = f"http://{host}:{web.server_port}/video"
            message = refused(url, tmp_path / "v", "url_not_allowed", allowed=allowed)
            assert "POST /v1/files" in message
    assert len(web.seen) == before


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "172.16.5.5",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_an_allowed_name_at_an_address_that_is_not_public(tmp_path, names, address):
    names[0]["videos.test"] = [[address]]
    names[0]["mixed.test"] = [["93.184.215.14", address]]
    for host in ("videos.test", "mixed.test"):
        message = refused(f"http://{host}/video", tmp_path / "v", "url_not_allowed", allowed=(host,))
        assert "not public" in message


def test_a_name_that_changes_its_address_between_check_and_connection(web, tmp_path, names):
    """The second look-up would lead elsewhere: there is none."""
    known, asked = names
    known["rebind.test"] = [["127.0.0.1"], ["10.0.0.1"]]
    url = f"http://rebind.test:{web.server_port}/video"
    assert get(url, tmp_path / "v", allowed=("rebind.test", "127.0.0.1"), seconds=10) == BODY
    assert asked == ["rebind.test"]


def test_the_next_address_is_tried(web, tmp_path, names):
    names[0]["two.test"] = [["127.0.0.9", "127.0.0.1"]]  # nobody listens at the first
    url = f"http://two.test:{web.server_port}/video"
    assert get(url, tmp_path / "v", allowed=("two.test", "127.0.0.0/8")) == BODY


def test_redirects_are_not_followed(web, tmp_path):
    before = len(web.seen)
    message = refused(f"http://127.0.0.1:{web.server_port}/moved", tmp_path / "v", "url_unreachable", allowed=LOCAL)
    assert "redirects are not followed" in message
    assert [path for path, _ in web.seen[before:]] == ["/moved"]


LOCAL = ("127.0.0.1",)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("missing", "url_unreachable"),
        ("too-short", "url_unreachable"),
        ("rubbish", "url_unreachable"),
        ("boasting", "file_too_large"),
        ("endless", "file_too_large"),
        ("slow", "url_unreachable"),
    ],
)
def test_servers_that_misbehave(web, tmp_path, path, code):
    url = f"http://127.0.0.1:{web.server_port}/{path}"
    refused(url, tmp_path / "v", code, allowed=LOCAL, max_bytes=1 << 20, seconds=1.0)


def test_a_body_longer_than_it_claims_is_read_as_far_as_it_claims(web, tmp_path):
    assert get(f"http://127.0.0.1:{web.server_port}/too-long", tmp_path / "v", allowed=LOCAL) == BODY[:-5]


def test_the_cap_is_exact(web, tmp_path):
    url = f"http://127.0.0.1:{web.server_port}/video"
    assert get(url, tmp_path / "v", allowed=LOCAL, max_bytes=len(BODY)) == BODY
    refused(url, tmp_path / "w", "file_too_large", allowed=LOCAL, max_bytes=len(BODY) - 1)


def test_hosts_that_do_not_exist_or_do_not_listen(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        refused(f"http://127.0.0.1:{port}/video", tmp_path / "v", "url_unreachable", allowed=LOCAL)
    refused("http://nowhere.invalid/video", tmp_path / "v", "url_unreachable", allowed=("nowhere.invalid",))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "concat:a|b", "/etc/passwd"]
)
def test_other_schemes(tmp_path, url):
    refused(url, tmp_path / "v", "url_not_allowed", allowed=("", "etc", *LOCAL))


@pytest.mark.parametrize("url", ["http://", "https:///path", "http://[::1", "http://127.0.0.1:99999999/x"])
def test_addresses_that_cannot_be_read(tmp_path, url):
    refused(url, tmp_path / "v", "invalid_url", allowed=LOCAL)


def test_data_uris(tmp_path):
    encoded = base64.b64encode(BODY).decode()
    assert get(f"data:video/mp4;base64,{encoded}", tmp_path / "v") == BODY
    assert get(f"DATA:;base64,{encoded}", tmp_path / "v", max_bytes=len(BODY)) == BODY
    assert get("data:,a%20b", tmp_path / "v") == b"a b"
    refused(f"data:video/mp4;base64,{encoded}", tmp_path / "w", "file_too_large", max_bytes=len(BODY) - 1)
    refused(f"data:video/mp4;base64,{encoded}", tmp_path / "w", "file_too_large", max_bytes=10)
    refused("data:," + "a" * 11, tmp_path / "w", "file_too_large", max_bytes=10)
    for broken in (
        "data:video/mp4;base64",
        "data:video/mp4;base64,AA?A",
        "data:video/mp4;base64,AAA",
        "data:;base64,ä",
    ):
        refused(broken, tmp_path / "w", "invalid_url")


def test_https_is_checked_against_the_name_not_the_address(tmp_path, names, monkeypatch):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=videos.test"
    make += " -addext subjectAltName=DNS:videos.test"
    subprocess.run([*make.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    names[0]["videos.test"] = names[0]["other.test"] = [["127.0.0.1"]]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(context=context) as server:
        for host, trusted in (("other.test", True), ("videos.test", True), ("videos.test", False)):
            if trusted:
                monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            else:
                monkeypatch.delenv("SSL_CERT_FILE")
            module.certificates.cache_clear()
            url = f"https://{host}:{server.server_port}/video"
            if trusted and host == "videos.test":
                assert get(url, tmp_path / "v", allowed=(host, "127.0.0.1")) == BODY
            else:
                message = refused(url, tmp_path / "w", "url_unreachable", allowed=(host, "127.0.0.1"))
                assert "certificate" in message.lower()
    module.certificates.cache_clear()
