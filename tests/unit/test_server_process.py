"""What starts and watches a server, with a stand-in for the server; `tests/e2e/cli` starts ours."""

import socket
import sys
from pathlib import Path

import httpx
import pytest

from f2l_vllm.server_process import ServerProcess, free_port, url_of

STAND_IN = """
import http.server, socket, socketserver, sys
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6
    server_bind = socketserver.TCPServer.server_bind  # without asking for the address's name, which may take a minute
Server((sys.argv[2], int(sys.argv[4])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


class StandIn(ServerProcess):
    ready_path = "/"

    def command(self, model):
        return [sys.executable, "-c", STAND_IN]


def test_a_server_at_an_ipv6_address_is_reached(tmp_path):
    server = StandIn("", tmp_path / "home", host="::1")
    try:
        server.wait_ready()
        assert httpx.get(server.url).status_code == 200
    finally:
        server.end()


@pytest.mark.parametrize(
    ("host", "url"), [("::1", "http://[::1]:80"), ("127.0.0.1", "http://127.0.0.1:80"), ("here", "http://here:80")]
)
def test_an_ipv6_address_is_in_brackets(host, url):
    assert url_of(host, 80) == url


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_a_free_port_is_one_of_the_address(host):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, free_port(host)))


def test_a_free_port_is_never_one_that_a_connection_could_take_meanwhile():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(free_port() < first for _ in range(100))


def test_an_address_of_another_machine_has_no_free_port():
    with pytest.raises(OSError, match="Cannot assign requested address"):
        free_port("192.0.2.1")
