"""Carries one RTSP connection between a demuxer on this machine and a server whose address was checked.

A demuxer follows a server's redirects to wherever they lead, and checks no certificate by itself. Behind this relay it
has one server: what the server says is taken apart, and only whole interleaved packets and plain answers pass.
"""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from typing import BinaryIO

from f2l_vllm.video.fetch import certificates

_LONGEST_LINE = 4000  # FFmpeg's buffer for a line is 4096
_MOST_LINES = 100
_LARGEST_BODY = 1 << 16
_STATUS = re.compile(rb"RTSP/1\.\d (\d{3})(?: [\x20-\x7e]*)?")
_HEADER = re.compile(rb"([A-Za-z0-9-]+):[\x20-\x7e\t]*")
_RTCP_TYPES = range(200, 205)
_BYE = 203


class RtspRelay:
    """Attributes:
    port: on loopback, where the demuxer connects.
    finished: the server said goodbye (RTCP BYE): what it sends is at its end.
    why: why the server's side ended, if it did not say goodbye.
    """

    def __init__(self, addresses: list[str], port: int, tls_name: str | None, seconds: float) -> None:
        """Connect to the first of the addresses that takes a connection; the server may be silent for `seconds`.

        Raises:
            OSError: no connection, or no valid certificate.
        """
        self.finished = False
        self.why = "it closed the connection"
        for index, address in enumerate(addresses):
            try:
                self._server = socket.create_connection((address, port), seconds)
                break
            except OSError:
                if index == len(addresses) - 1:
                    raise
        if tls_name is not None:
            self._server = certificates().wrap_socket(self._server, server_hostname=tls_name)
        self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(seconds)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        client = None
        try:
            client, _ = self._listener.accept()
            self._listener.close()
            threading.Thread(target=_copy, args=(client, self._server), daemon=True).start()
            with self._server.makefile("rb") as answers:
                while self._pass_one(answers, client):
                    pass
        except TimeoutError:
            self.why = "it sent nothing for too long"
        except _Refused as error:
            self.why = str(error)
        except OSError as error:
            self.why = str(error)
        finally:
            for end in (client, self._server):
                if end is not None:
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def _pass_one(self, answers: BinaryIO, client: socket.socket) -> bool:
        """Pass on one packet or one answer; False at the end."""
        first = answers.read(1)
        if first == b"$":
            head = _exactly(answers, 3)
            packet = _exactly(answers, int.from_bytes(head[1:], "big"))
            self.finished = self.finished or _says_goodbye(packet)
            client.sendall(first + head + packet)
            return True
        if first in (b"\r", b"\n"):
            return True
        if not first:
            return False
        lines = [_line(first, answers)]
        while line := _line(b"", answers):
            if len(lines) == _MOST_LINES or not _HEADER.fullmatch(line):
                raise _Refused("its answer cannot be read")
            lines.append(line)
        length = next((line.partition(b":")[2] for line in lines if line.lower().startswith(b"content-length:")), b"0")
        if not length.strip().isdigit() or int(length) > _LARGEST_BODY:
            raise _Refused("its answer is too long")
        body = _exactly(answers, int(length))
        status = _STATUS.fullmatch(lines[0])
        if status is None:
            return True  # the server asks something, and no demuxer needs to know
        if status[1].startswith(b"3"):
            raise _Refused("it redirects, and redirects are not followed, so give the address it leads to")
        if status[1].startswith((b"4", b"5")) and status[1] != b"401":
            self.why = f"it answered with status {status[1].decode()}"
        client.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        return True


class _Refused(Exception):
    """What the server says is not passed on."""


def _line(start: bytes, answers: BinaryIO) -> bytes:
    line = start + answers.readline(_LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise _Refused("its answer breaks off or has a line that is too long")
    return line.rstrip(b"\r\n")


def _exactly(answers: BinaryIO, count: int) -> bytes:
    data = answers.read(count)
    if len(data) < count:
        raise _Refused("it closed the connection")
    return data


def _says_goodbye(packet: bytes) -> bool:
    """Whether a packet is RTCP with a BYE in it (RFC 3550, section 6.6)."""
    while len(packet) >= 4 and packet[0] >> 6 == 2 and packet[1] in _RTCP_TYPES:
        if packet[1] == _BYE:
            return True
        packet = packet[4 * (int.from_bytes(packet[2:4], "big") + 1) :]
    return False


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
