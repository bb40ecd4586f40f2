"""Tenants: a key identifies its tenant, every file belongs to one tenant, and others cannot see that it exists."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from starlette.requests import Request

logger = logging.getLogger(__name__)

DEFAULT_TENANT = "default"
_HASHED = "sha256:"
_LONGEST_NAME = 128  # the length of the catalog's column


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
        path: the tenants' file, or None.

    Raises:
        ValueError: both are given, or the file cannot be read; the message says what to do.
    """

    def __init__(self, server_keys: Sequence[str], path: Path | None) -> None:
        if server_keys and path is not None:
            raise ValueError(
                "set either --api-key (or VLLM_API_KEY) or F2L_TENANTS: with tenants, write the key into their file, "
                f"under a tenant '{DEFAULT_TENANT}' if the files uploaded with it so far are to stay its own"
            )
        self._path = path
        self._stamp = _stamp(path) if path is not None else None
        self._tenants = {_digest(key): DEFAULT_TENANT for key in server_keys} if path is None else _read(path)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return self._path is None and not self._tenants

    @property
    def has_tenants(self) -> bool:
        """Whether keys distinguish callers."""
        return self._path is not None

    def tenant(self, authorization: str | None) -> str | None:
        """The tenant of an `Authorization` header; None when it holds no valid key."""
        if self.is_open:
            return DEFAULT_TENANT
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = _digest(key), None
        for known, tenant in self._tenants.items():  # all of them, so that timing reveals nothing
            if secrets.compare_digest(digest, known):
                found = tenant
        return found if scheme.lower() == "bearer" else None

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


def _read(path: Path) -> dict[bytes, str]:
    try:
        text = path.read_text(encoding="utf-8")
        given: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"F2L_TENANTS: {path} cannot be read: {error}") from error
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"F2L_TENANTS: {path} must hold an object of tenants, each with a list of keys")
    tenants: dict[bytes, str] = {}
    for tenant, keys in given.items():
        if not 0 < len(tenant) <= _LONGEST_NAME:
            raise ValueError(f"F2L_TENANTS: a tenant's name has 1 to {_LONGEST_NAME} characters, got {tenant!r}")
        if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
            raise ValueError(f"F2L_TENANTS: tenant {tenant!r} needs a list of keys, each a string that is not empty")
        for key in keys:
            digest = _digest(key) if not key.startswith(_HASHED) else _from_hex(tenant, key.removeprefix(_HASHED))
            if tenants.setdefault(digest, tenant) != tenant:
                raise ValueError(f"F2L_TENANTS: tenants {tenants[digest]!r} and {tenant!r} share a key")
    return tenants


def _from_hex(tenant: str, text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError(f"F2L_TENANTS: a key of tenant {tenant!r} is no sha256 in hex: {_HASHED} and 64 digits")
    return digest


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
