"""Fetches a video by its URL into a local file: a `data:` URI, or http(s) from hosts that the operator allows.

This machine connects to whatever a client names. It therefore looks the name up once, checks the IP address, and
connects to that address, so that the name cannot point elsewhere after the check. Redirects are not followed, and
proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from urllib.parse import unquote_to_bytes

import certifi
import httpx

from f2l_vllm.video.errors import VideoError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched.

    Attributes:
        allowed: host names, exactly as in URLs, and IP addresses or networks. An IP address that is not public
            (private, loopback, link-local …) must be listed here.
        max_bytes: of a video, fetched or in a `data:` URI.
        seconds: for everything, from the look-up of the name to the last byte.
    """

    allowed: tuple[str, ...] = ()
    max_bytes: int = 1 << 30
    seconds: float = 60.0

    @cached_property
    def networks(self) -> tuple[_Network, ...]:
        """The allowed entries that are addresses or networks."""
        return tuple(network for entry in self.allowed if (network := _network(entry)) is not None)

    @cached_property
    def names(self) -> frozenset[str]:
        """The allowed entries that are names."""
        return frozenset(_normal(entry) for entry in self.allowed if _network(entry) is None)

    def allows_address(self, address: _Address) -> bool:
        """Whether this machine may connect to the address for a client: it is public, or listed."""
        return _is_public(address) or any(address in network for network in self.networks)


async def fetch(
    url: str, target: Path, policy: FetchPolicy, check_room: Callable[[int], None] = lambda _more: None
) -> None:
    """Write the video at `url` to `target`; after an error the file does not exist.

    `check_room` is called with a number of bytes before they are written, and raises if there is no room for them.

    Raises:
        VideoError: `invalid_url`, `url_not_allowed`, `url_unreachable`, `file_too_large`.
    """
    try:
        if url[:5].lower() == "data:":
            data = await asyncio.to_thread(decode_data_uri, url, policy.max_bytes)
            check_room(len(data))
            await asyncio.to_thread(target.write_bytes, data)
            return
        async with asyncio.timeout(policy.seconds):
            await _download(url, target, policy, check_room)
    except TimeoutError as error:
        target.unlink(missing_ok=True)
        message = (
            f"The address did not deliver within {policy.seconds:g} s; upload the video, or send a data URI, instead."
        )
        raise VideoError("url_unreachable", message) from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URI; a URI with too many bytes is refused before it is decoded.

    Raises:
        VideoError: `invalid_url`, `file_too_large`.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise _invalid("a data URI needs a comma between its media type and its data")
    if not head.rstrip().lower().endswith(";base64"):
        if len(body) > 3 * max_bytes:  # a byte takes at most three characters
            raise _too_large(max_bytes)
        data = unquote_to_bytes(body)
    else:
        if len(body) // 4 * 3 > max_bytes + 3:
            raise _too_large(max_bytes)
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise _invalid(f"its data is not base64 ({error})") from error
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


@asynccontextmanager
async def open_url(
    method: str,
    url: str,
    policy: FetchPolicy,
    *,
    headers: Mapping[str, str] | None = None,
    content: bytes | None = None,
    any_public: bool = False,
) -> AsyncIterator[httpx.Response]:
    """The answer of an http(s) address whose host was checked, before its body is read; no redirect is followed.

    Raises:
        VideoError: `invalid_url`, `url_not_allowed`, `url_unreachable`, this also for a body that breaks off.
    """
    parsed, host = parse(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    addresses = await resolve(host, port, policy, any_public=any_public)
    sent = {"Host": parsed.netloc.decode("ascii"), "Accept-Encoding": "identity", "User-Agent": "f2l-vllm"}
    async with httpx.AsyncClient(verify=certificates(), trust_env=False, timeout=policy.seconds) as client:
        try:
            for index, address in enumerate(addresses):
                # The certificate is checked against the name; the connection goes to the checked address.
                request = client.build_request(
                    method,
                    parsed.copy_with(host=address),
                    headers={**(headers or {}), **sent},
                    content=content,
                    extensions={"sni_hostname": host},
                )
                try:
                    response = await client.send(request, stream=True, follow_redirects=False)
                    break
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    if index == len(addresses) - 1:
                        raise
            try:
                yield response
            finally:
                await response.aclose()
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise unreachable(host, str(error) or type(error).__name__) from error


async def _download(url: str, target: Path, policy: FetchPolicy, check_room: Callable[[int], None]) -> None:
    async with open_url("GET", url, policy) as response:
        await _save(response, target, policy.max_bytes, check_room)


def parse(url: str, schemes: Sequence[str] = ("http", "https")) -> tuple[httpx.URL, str]:
    """An address of one of these schemes, and its host as policies name it.

    Raises:
        VideoError: `invalid_url`, `url_not_allowed`.
    """
    try:
        parsed = httpx.URL(url)
        host = _normal(parsed.raw_host.decode("ascii"))
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise _invalid(str(error)) from error
    if parsed.scheme not in schemes:
        raise VideoError(
            "url_not_allowed",
            f"Videos and pictures are read by http, https and data URIs, not by '{parsed.scheme[:16]}:'.",
        )
    if not host:
        raise _invalid("it names no host")
    if (parsed.port or 0) > 65535:
        raise _invalid("it names a port that does not exist")
    return parsed, host


async def resolve(host: str, port: int, policy: FetchPolicy, *, any_public: bool = False) -> Sequence[str]:
    """The IP addresses of an allowed host, all of them checked; connect to these, and look the name up no more.

    `any_public` is for addresses to which nothing is sent but what their owner asked for: there a host need not be
    listed when it is at a public address.

    Raises:
        VideoError: `url_not_allowed`, `url_unreachable`.
    """
    literal = _network(host)
    if literal is not None:
        address = literal.network_address
        if any(address in network for network in policy.networks) or (any_public and policy.allows_address(address)):
            return [host]
        raise _not_allowed(host)
    if not any_public and host not in policy.names:
        raise _not_allowed(host)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise unreachable(host, "no such host") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for name in addresses:
        if not policy.allows_address(ipaddress.ip_address(name)):
            raise VideoError(
                "url_not_allowed",
                f"The host '{host}' is at an address that is not public, and this server does not connect there; "
                "upload the video, or send a data URI, instead.",
            )
    return addresses


async def _save(response: httpx.Response, target: Path, max_bytes: int, check_room: Callable[[int], None]) -> None:
    if response.status_code != 200:
        why = f"it answered with status {response.status_code}"
        if response.is_redirect:
            why += "; redirects are not followed, so give the address it leads to"
        raise unreachable(response.request.headers["Host"], why)
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    check_room(int(length) if length.isdecimal() else 0)
    received = 0
    with target.open("wb") as file:
        async for piece in response.aiter_raw(_PIECE_BYTES):
            received += len(piece)
            if received > max_bytes:
                raise _too_large(max_bytes)
            check_room(len(piece))
            await asyncio.to_thread(file.write, piece)


@cache
def certificates() -> ssl.SSLContext:
    """The machine's authorities (or SSL_CERT_FILE's) and those of httpx; read once, because reading takes long."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _normal(host: str) -> str:
    return host.strip().strip("[]").rstrip(".").lower()


def _network(entry: str) -> _Network | None:
    try:
        return ipaddress.ip_network(_normal(entry), strict=False)
    except ValueError:
        return None


def _is_public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not address.is_multicast


def _invalid(why: str) -> VideoError:
    return VideoError("invalid_url", f"The address cannot be read: {why}.")


def _not_allowed(host: str) -> VideoError:
    return VideoError(
        "url_not_allowed",
        f"This server fetches nothing from '{host[:256]}': send the video or picture as a data URI, upload videos with "
        "POST /v1/files, or ask the operator to add the host to F2L_ALLOWED_MEDIA_DOMAINS.",
    )


def unreachable(host: str, why: str) -> VideoError:
    """The error about a host that did not give what it was asked for."""
    return VideoError("url_unreachable", f"Nothing could be fetched from '{host[:256]}': {why[:300]}.")


def _too_large(max_bytes: int) -> VideoError:
    return VideoError(
        "file_too_large",
        f"It has more than the {max_bytes / 1e6:.1f} MB that are accepted; send a smaller or shorter one.",
    )
