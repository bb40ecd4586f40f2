"""An adapter's home: the one of a catalog's servers that has it in memory before anybody asks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def home(adapter_name: str, servers: Sequence[str]) -> str | None:
    """The server with the largest hash of both names (rendezvous hashing): when a server comes or goes, only the
    adapters at that server get another home. None if there are no servers.

    Source: Thaler and Ravishankar, Using Name-Based Mappings to Increase Hit Rates, 1998.
    """
    return max(servers, key=lambda server: _weight(adapter_name, server), default=None)


def _weight(adapter_name: str, server: str) -> bytes:
    return hashlib.blake2b(f"{adapter_name}\0{server}".encode(), digest_size=8).digest()
