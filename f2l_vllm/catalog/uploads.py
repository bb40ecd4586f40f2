"""Files that come in parts: what was announced, and what has become of it. Any server of a catalog takes any part."""

from __future__ import annotations

import secrets
from dataclasses import asdict, replace

from sqlalchemy import ColumnElement, Connection, Select, delete, func, insert, select, update

from f2l_vllm.catalog.database import Database, moment
from f2l_vllm.catalog.states import LIVE
from f2l_vllm.catalog.tables import files
from f2l_vllm.catalog.upload_tables import LASTING_SECONDS, PartialUpload, uploads

_KEPT_SECONDS = 600.0  # for one that is completed in its last moment


class TooManyUploads(RuntimeError):
    """The tenant has as many pending uploads as it may have."""


class Uploads(Database):
    """The uploads in parts of all tenants. Every method is one transaction."""

    def begin_upload(
        self, tenant: str, size: int, filename: str, purpose: str, expiry: tuple[float | None, float | None], limit: int
    ) -> PartialUpload:
        """Enter one of so many bytes.

        Raises:
            TooManyUploads: the tenant has `limit` pending ones.
        """
        self._check_room()
        name = f"upload_{secrets.token_hex(12)}"
        with self._write() as connection:
            now = moment(connection)
            if (connection.scalar(_pending(func.count(), tenant, now)) or 0) >= limit:
                raise TooManyUploads
            upload = PartialUpload(name, tenant, size, filename, purpose, now, *expiry)
            connection.execute(insert(uploads), asdict(upload))
            return upload

    def upload(self, upload_id: str, tenant: str) -> PartialUpload | None:
        """A tenant's upload; None if there is no such upload, or its time is up."""
        with self._read() as connection:
            found = _find(connection, upload_id, tenant)
        return None if found is None or found.expires_at <= self.now() else found

    def count_parts(self, upload: PartialUpload) -> int:
        """How many parts are here."""
        query = select(func.count()).where(files.c.tenant == upload.id, files.c.state.in_(LIVE))
        with self._read() as connection:
            return connection.scalar(query) or 0

    def end_upload(self, upload: PartialUpload, status: str, file_id: str | None = None) -> PartialUpload:
        """Note that a pending one is completed or cancelled; returns what it is. One that has ended stays as it is."""
        with self._write(beside=()) as connection:
            known = _find(connection, upload.id, upload.tenant, hold=True)
            if known is None or known.status != "pending":
                return known or upload
            of_it = uploads.c.id == upload.id
            connection.execute(update(uploads).where(of_it).values(status=status, file_id=file_id))
            return replace(known, status=status, file_id=file_id)

    def promised_bytes(self, tenant: str) -> int:
        """How many bytes a tenant's pending uploads are going to have."""
        with self._read() as connection:
            return int(connection.scalar(_pending(func.sum(uploads.c.bytes), tenant, self.now())) or 0)

    def purge_uploads(self) -> int:
        """Forget those whose time is up; returns how many. Their parts expire as files do."""
        with self._write(beside=()) as connection:
            over = uploads.c.created_at < moment(connection) - LASTING_SECONDS - _KEPT_SECONDS
            return connection.execute(delete(uploads).where(over)).rowcount


def _pending(counted: ColumnElement[int], tenant: str, now: float) -> Select[int]:
    lasts = uploads.c.created_at > now - LASTING_SECONDS
    return select(counted).where(uploads.c.tenant == tenant, uploads.c.status == "pending", lasts)


def _find(connection: Connection, upload_id: str, tenant: str, *, hold: bool = False) -> PartialUpload | None:
    query = select(uploads).where(uploads.c.id == upload_id, uploads.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if hold else query).first()
    return None if row is None else PartialUpload(**row._mapping)
