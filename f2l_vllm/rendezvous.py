"""Rendezvous hashing: each name has a home among the servers, and an order of all others behind it.

When a server comes or goes, only the names at that server get another home.

Source: Thaler and Ravishankar, Using Name-Based Mappings to Increase Hit Rates, 1998.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache


def home(name: str, servers: Sequence[str]) -> str | None:
    """The server with the largest hash of both names; None if there are no servers."""
    return max(servers, key=lambda server: _weight(name, server), default=None)


@lru_cache(maxsize=1 << 16)
def order(name: str, servers: tuple[str, ...]) -> tuple[str, ...]:
    """All servers, the home first, then the one that is it when the home is away, and so on; remembered for the names
    asked last."""
    return tuple(sorted(servers, key=lambda server: _weight(name, server), reverse=True))


def _weight(name: str, server: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{server}".encode(), digest_size=8).digest()
