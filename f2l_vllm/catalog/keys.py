"""API keys: which tenant each belongs to. Only a key's hash is kept; the key itself is said once, when it is made.

No key is ever made twice, so one that was revoked is never valid again. Deleting its row writes a tombstone in the same
transaction, by which every server forgets it.
"""

from __future__ import annotations

import hashlib
import secrets

from sqlalchemy import delete, insert, select, update

from f2l_vllm.catalog.database import Database, now
from f2l_vllm.catalog.tables import KEY, KeyRecord, keys, tombstones
from f2l_vllm.catalog.tombstones import doom

_PREFIX = "sk-f2l-"
_RANDOM_BYTES = 32


def key_hash(key: str) -> str:
    """The SHA-256 of a key in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Keys(Database):
    """The keys of all servers with `F2L_TENANTS=catalog`."""

    def add_key(self, tenant: str, label: str = "") -> str:
        """Enter a fresh random key and return it."""
        key = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        self._check_room()
        with self._append() as connection:
            values = {"sha256": key_hash(key), "tenant": tenant, "label": label, "created_at": now(connection)}
            connection.execute(insert(keys).values(values))
        return key

    def api_keys(self) -> list[KeyRecord]:
        """All keys, oldest first."""
        with self._read() as connection:
            rows = connection.execute(select(keys).order_by(keys.c.created_at, keys.c.sha256))
            return [KeyRecord(*row) for row in rows]

    def revoke_key(self, sha256: str) -> int | None:
        """Delete a key. Returns the number of its tombstone; None if there is no such key."""
        with self._write(beside=(), deletes=True) as connection:
            if connection.execute(delete(keys).where(keys.c.sha256 == sha256)).rowcount == 0:
                return None
            (tombstone,) = doom(connection, KEY, [(sha256, "")])
            done = update(tombstones).where(tombstones.c.seq == tombstone.seq)
            connection.execute(done.values(done_at=now(connection)))  # nothing of it is in the store
            return tombstone.seq
