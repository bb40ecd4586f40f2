"""Errors of the catalog or the store that are no fault of the request."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_AWAY = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENODEV}


class Unavailable(RuntimeError):
    """The catalog or the store cannot be used now; nothing was changed. `code` is stable; `full` means out of room."""

    code = "unavailable"
    full = False


class CatalogBusy(Unavailable):
    """The catalog is locked by another writer, or its database is away. `retry_after` is in seconds."""

    code = "catalog_busy"
    retry_after = 5


class StoreUnavailable(Unavailable):
    """The store cannot be read or written: full, read-only, or away."""

    code = "store_unavailable"

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class AdapterIdsExhausted(Unavailable):
    """Every adapter id of this catalog has been used; ids are never reused."""

    code = "adapter_ids_exhausted"
    full = True

    def __init__(self, message: str = "every adapter id of this catalog is used: start with a new one") -> None:
        super().__init__(message)


class OtherModels(Unavailable):
    """The catalog's files are answered by servers with other models or sampling than this one's."""

    code = "other_models"

    def __init__(self) -> None:
        super().__init__("this server has another model, hypernetwork or sampling than the servers that answer now")


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full, read-only or failing disk into `StoreUnavailable`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreUnavailable(f"no room is left to {what}: {error}", full=True) from error
        if error.errno in _AWAY:
            raise StoreUnavailable(f"the store does not let this server {what}: {error}") from error
        raise
