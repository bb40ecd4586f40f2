"""The catalog's published adapters: which ones exist, what they are made of, and which ones nobody needs any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import and_, case, delete, exists, func, insert, or_, select

from f2l_vllm.catalog.database import Database
from f2l_vllm.catalog.states import LIVE, VideoState
from f2l_vllm.catalog.tables import ADAPTER, AdapterRecord, FileRecord, Tombstone, adapters, files, parts
from f2l_vllm.catalog.tombstones import doom
from f2l_vllm.catalog.transactions import (
    adapter_of,
    adapter_record,
    drop_adapters,
    drop_unwanted,
    ensure_job,
    files_of,
    insert_adapter,
    move,
    standing,
)
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.address import object_name

_PARAMETERS = 500  # databases bound the number of parameters
_PINNED = 4096  # more than the hot set holds
_AT_ONCE = 200  # adapters that one transaction drops: other writers wait for it


class Published(Database):
    """The adapters that answers come from, and adapters composed of others."""

    def adapter(self, name: str) -> AdapterRecord | None:
        """The published adapter of this name, or None."""
        with self._read() as connection:
            return adapter_of(connection, name)

    def published(self, names: Collection[str]) -> set[str]:
        """Those of these names in the store that are published adapters'."""
        stems, found = sorted({name.partition(".")[0] for name in names}), set[str]()
        with self._read() as connection:
            for start in range(0, len(stems), _PARAMETERS):
                query = select(adapters.c.name, adapters.c.generation)
                query = query.where(adapters.c.name.in_(stems[start : start + _PARAMETERS]))
                found |= {object_name(*row) for row in connection.execute(query)}
        return found & set(names)

    def adapters_of(self, records: Collection[FileRecord]) -> dict[str, AdapterRecord]:
        """The published adapters of these files, by name."""
        names = sorted({record.adapter_name for record in records if record.state is VideoState.PROCESSED})
        found: dict[str, AdapterRecord] = {}
        with self._read() as connection:
            for start in range(0, len(names), _PARAMETERS):
                query = select(adapters).where(adapters.c.name.in_(names[start : start + _PARAMETERS]))
                found |= {row.name: adapter_record(row) for row in connection.execute(query)}
        return found

    def recent_adapters(self, limit: int) -> list[AdapterRecord]:
        """At most `limit` adapters of ready files: pinned ones first, then the most recently used (or made)."""
        of_file = and_(files.c.adapter_name == adapters.c.name, files.c.state == VideoState.PROCESSED)
        pinned = exists().where(of_file, files.c.pinned.is_(True))
        used = func.coalesce(adapters.c.last_used_at, adapters.c.created_at)
        first = case((pinned, 1), else_=0).desc()
        query = select(adapters).where(exists().where(of_file)).order_by(first, used.desc()).limit(limit)
        with self._read() as connection:
            return [adapter_record(row) for row in connection.execute(query)]

    def pinned_adapters(self) -> set[str]:
        """The names in the store of the adapters that the newest few thousand pinned files answer from."""
        query = select(adapters.c.name, adapters.c.generation).join(files, files.c.adapter_name == adapters.c.name)
        query = query.where(files.c.pinned.is_(True), files.c.state == VideoState.PROCESSED)
        with self._read() as connection:
            return {
                object_name(*row) for row in connection.execute(query.order_by(files.c.number.desc()).limit(_PINNED))
            }

    def newest_adapter(self) -> int:
        """The largest adapter id; 0 if there is no adapter."""
        with self._read() as connection:
            return connection.scalar(select(func.max(adapters.c.id))) or 0

    def adapters_after(self, number: int, limit: int) -> list[AdapterRecord]:
        """At most `limit` adapters with ids above this one, in the order of their ids."""
        query = select(adapters).where(adapters.c.id > number).order_by(adapters.c.id).limit(limit)
        with self._read() as connection:
            return [adapter_record(row) for row in connection.execute(query)]

    def forget_adapter(self, adapter: AdapterRecord) -> None:
        """Forget a missing or damaged adapter: its files wait again, for a new job under the same name.

        Nothing happens if it is already forgotten or has been made again. A composed adapter gets no new job.
        """
        name = adapter.name
        with self._write() as connection:
            if connection.execute(delete(adapters).where(adapters.c.id == adapter.id)).rowcount == 0:
                return
            waiting = [record for record in files_of(connection, name) if record.state is VideoState.PROCESSED]
            if waiting:
                ensure_job(connection, name, waiting[0].sha256, standing(connection, name))
            move(connection, waiting, VideoState.UPLOADED)
            if adapter.composed:
                connection.execute(delete(parts).where(parts.c.composed == name))
            else:
                doom(connection, ADAPTER, [(name, adapter.generation)])

    def drop_abandoned(self) -> list[Tombstone]:
        """Remove some of the adapters that no file refers to: those of other revisions whose successors are made."""
        named = or_(files.c.adapter_name == adapters.c.name, files.c.previous_adapter == adapters.c.name)
        kept = exists().where(named, files.c.state.in_(LIVE))
        query = select(adapters.c.name).where(adapters.c.composed.is_(False), ~kept).limit(_AT_ONCE)
        with self._read() as connection:
            names = list(connection.scalars(query))
        if not names:
            return []
        with self._write() as connection:
            return drop_unwanted(connection, names)

    # Composed adapters

    def add_composed(
        self, name: str, made_of: Sequence[str], *, rank: int, size: int, info: AdapterInfo
    ) -> AdapterRecord | None:
        """Enter an adapter composed of others, or return the existing one. It is removed with its first part to go.

        None if a part has left the catalog meanwhile.

        Raises:
            AdapterIdsExhausted: no int32 id is left.
        """
        self._check_room()
        with self._write() as connection:
            found = adapter_of(connection, name)
            if found is not None:
                return found
            names = sorted(set(made_of))
            there = select(func.count()).select_from(adapters).where(adapters.c.name.in_(names))
            if connection.scalar(there) != len(names):
                return None
            record = insert_adapter(
                connection, {"name": name, "rank": rank, "bytes": size, "info": info, "composed": True}
            )
            connection.execute(insert(parts), [{"composed": name, "part": part} for part in names])
            return record

    def oldest_composed(self, keep: int) -> list[AdapterRecord]:
        """All composed adapters except the `keep` most recently used (or made); the caller may remove them."""
        used = func.coalesce(adapters.c.last_used_at, adapters.c.created_at)
        query = select(adapters).where(adapters.c.composed.is_(True)).order_by(used.desc()).offset(keep)
        with self._read() as connection:
            return [adapter_record(row) for row in connection.execute(query)]

    def remove_composed(self, name: str) -> list[Tombstone]:
        """Remove a composed adapter and those composed of it; the tombstones name what the store has to remove."""
        with self._write() as connection:
            found = adapter_of(connection, name)
            return drop_adapters(connection, [name]) if found is not None and found.composed else []
