"""A small RTSP server (RFC 2326): it sends the packets of an MPEG-TS file as RTP over its connection."""

from __future__ import annotations

import socketserver
import struct
import threading
from pathlib import Path
from typing import Any

_SDP = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
_PACKET = 188
_IN_ONE = 7  # as many as fit an Ethernet frame


class RtspSource:
    """Serves `file` once to each connection.

    Then it says goodbye if `goodbye`, and closes the connection if `hang` does not say otherwise. It hangs as soon as
    it has heard the method `hang_at`, and redirects to `redirect` instead of describing.
    """

    def __init__(
        self,
        file: Path,
        *,
        port: int = 0,
        goodbye: bool = True,
        hang: bool = False,
        hang_at: str = "",
        redirect: str = "",
    ) -> None:
        self.requests: list[str] = []
        self.connections = 0
        self._ending = threading.Event()
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                outer.connections += 1
                while (head := self._head()) is not None:
                    method, address, _ = head[0].split()
                    sequence = next(line.split(":")[1].strip() for line in head if line.lower().startswith("cseq"))
                    outer.requests.append(f"{method} {address}")
                    if method == hang_at:
                        outer._ending.wait()
                        return
                    if method == "DESCRIBE" and redirect:
                        self._answer(sequence, Location=redirect, status="302 Found")
                    elif method == "DESCRIBE":
                        self._answer(sequence, _SDP, Content_Type="application/sdp", Content_Base=address + "/")
                    elif method == "SETUP":
                        self._answer(sequence, Transport="RTP/AVP/TCP;unicast;interleaved=0-1", Session="1")
                    elif method == "PLAY":
                        self._answer(sequence, Session="1")
                        self._play()
                        return
                    else:
                        self._answer(sequence, Public="OPTIONS, DESCRIBE, SETUP, PLAY")

            def _head(self) -> list[str] | None:
                lines = []
                while line := self.rfile.readline().decode().strip():
                    lines.append(line)
                return lines or None

            def _answer(self, sequence: str, body: bytes = b"", status: str = "200 OK", **headers: str) -> None:
                said = {"CSeq": sequence, **headers, "Content-Length": str(len(body))}
                lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in said.items())
                self.wfile.write(f"RTSP/1.0 {status}\r\n{lines}\r\n".encode() + body)

            def _play(self) -> None:
                data, size = file.read_bytes(), _PACKET * _IN_ONE
                for number, start in enumerate(range(0, len(data), size)):
                    self._packet(
                        0,
                        struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, number * 100, 7) + data[start : start + size],
                    )
                if goodbye:
                    self._packet(1, struct.pack(">BBHIIIIII", 0x80, 200, 6, 7, 0, 0, 0, 0, 0))
                    self._packet(1, struct.pack(">BBHI", 0x81, 203, 1, 7))
                if hang:
                    outer._ending.wait()

            def _packet(self, channel: int, packet: bytes) -> None:
                self.wfile.write(struct.pack(">cBH", b"$", channel, len(packet)) + packet)

        socketserver.ThreadingTCPServer.allow_reuse_address = True
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.address = f"rtsp://127.0.0.1:{self.port}/live"

    def __enter__(self) -> RtspSource:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
