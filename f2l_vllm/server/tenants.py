"""Tenants: a key identifies its tenant, every file belongs to one tenant, and others cannot see that it exists."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tomllib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from starlette.requests import Request

from f2l_vllm.catalog.keys import key_hash
from f2l_vllm.catalog.tables import LONGEST_TENANT

logger = logging.getLogger(__name__)

DEFAULT_TENANT = "default"
ON_BEHALF = "f2l.on_behalf"  # in the scope of a request that this server sends to itself: whose request it is
_HASHED = "sha256:"

# The tenant of the current request, for code that does not get the request itself.
asking_tenant: ContextVar[str] = ContextVar("asking_tenant", default=DEFAULT_TENANT)


def tenant_of(request: Request | None) -> str:
    """The caller's tenant; `default` if keys do not distinguish callers or if there is no HTTP request."""
    return getattr(request.state, "tenant", DEFAULT_TENANT) if request is not None else DEFAULT_TENANT


class Keys:
    """Which tenant a key belongs to: the server's own keys belong to the tenant `default`, or a file names tenants.

    The file is TOML if its name ends in `.toml`, else JSON. It holds `{tenant: [key, …]}`;
    a key is plain text, or `sha256:` and its hash in hex. The next request after a change reads the file again; if it
    cannot be read, the old keys stay.

    Args:
        server_keys: keys of the tenant `default`.
        tenants: the tenants' file; or `catalog`, whose keys `CatalogKeys` adds.

    Attributes:
        is_open: whether no key is needed.
        has_tenants: whether keys distinguish callers.

    Raises:
        ValueError: both are given, or the file cannot be read; the message says what to do.
    """

    def __init__(self, server_keys: Sequence[str], tenants: Path | Literal["catalog"] | None) -> None:
        if server_keys and tenants is not None:
            raise ValueError(
                "set either --api-key (or VLLM_API_KEY) or F2L_TENANTS: with tenants every key belongs to one, "
                f"and files uploaded without tenants belong to '{DEFAULT_TENANT}'"
            )
        self.is_open = not server_keys and tenants is None
        self.has_tenants = tenants is not None
        self._path = tenants if isinstance(tenants, Path) else None
        self._stamp = _stamp(self._path) if self._path is not None else None
        self._tenants = {key_hash(key): DEFAULT_TENANT for key in server_keys}
        if self._path is not None:
            self._tenants = _read(self._path)

    def tenant(self, authorization: str | None) -> str | None:
        """The tenant of an `Authorization` header; None when it holds no valid key."""
        if self.is_open:
            return DEFAULT_TENANT
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        found = self._tenants.get(key_hash(key))  # by hash, so that timing reveals nothing
        return found if scheme.lower() == "bearer" else None

    def knows(self, tenant: str) -> bool:
        """Whether there is a valid key of this tenant's."""
        if self.is_open:
            return tenant == DEFAULT_TENANT
        self._refresh()
        return tenant in self._tenants.values()

    async def look_again(self) -> None:
        """Learn of keys that `tenant` may have missed. Called when it knows none, before the request is refused."""

    def _refresh(self) -> None:
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tenants = _read(self._path)
            logger.info("tenants' keys were read again: %d keys", len(self._tenants))
        except ValueError as error:
            logger.error("the tenants' keys stay as they were: %s", error)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
        given: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"F2L_TENANTS: {path} cannot be read: {error}") from error
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"F2L_TENANTS: {path} must hold an object of tenants, each with a list of keys")
    tenants: dict[str, str] = {}
    for tenant, keys in given.items():
        if not 0 < len(tenant) <= LONGEST_TENANT:
            raise ValueError(f"F2L_TENANTS: a tenant's name has 1 to {LONGEST_TENANT} characters, got {tenant!r}")
        if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
            raise ValueError(f"F2L_TENANTS: tenant {tenant!r} needs a list of keys, each a string that is not empty")
        for key in keys:
            digest = key_hash(key) if not key.startswith(_HASHED) else _from_hex(tenant, key.removeprefix(_HASHED))
            if tenants.setdefault(digest, tenant) != tenant:
                raise ValueError(f"F2L_TENANTS: tenants {tenants[digest]!r} and {tenant!r} share a key")
    return tenants


def _from_hex(tenant: str, text: str) -> str:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError(f"F2L_TENANTS: a key of tenant {tenant!r} is no sha256 in hex: {_HASHED} and 64 digits")
    return digest.hex()
