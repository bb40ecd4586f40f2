"""Hears the catalog's notices, so that nobody has to ask for changes many times a second.

Notices may be lost: on the way through a connection pooler, and while PostgreSQL restarts. So a listener proves again
and again that they arrive. Its users keep asking the catalog now and then while they do, and often while they do not.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from f2l_vllm.catalog.database import SESSION, Database
from f2l_vllm.catalog.notices import CHANNEL

if TYPE_CHECKING:
    import psycopg

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 1.0
_SLICE_SECONDS = 0.1  # how long `close` may go unnoticed
_PROOF_SECONDS = 15.0  # between two proofs
_ANSWER_SECONDS = 2.0  # how long a proof may take to arrive
_RETRY_SECONDS = 1.0  # after a lost connection
_UNHEARD_SECONDS = 60.0  # after a proof that did not arrive


class _Unheard(RuntimeError):
    """A notice did not arrive."""


def check_url(url: str | None, catalog_url: str) -> None:
    """Check a URL for listening to the catalog's notices, without connecting; None: the catalog's own.

    Raises:
        ValueError: nothing can be heard there.
    """
    if url is None:
        return
    try:
        kinds = {make_url(one).get_backend_name() for one in (url, catalog_url)}
    except ArgumentError as error:
        raise ValueError(f"F2L_LISTEN_URL is no database URL: {error}") from error
    if kinds != {"postgresql"}:
        raise ValueError("F2L_LISTEN_URL is for a catalog in PostgreSQL and leads to the same database: unset it")


def listen(catalog: Database, url: str | None = None) -> Listener | None:
    """Begin to listen to a catalog's notices; None if its database sends none.

    Args:
        url: a way to the same database without a pooler; None: the catalog's own URL.
    """
    if catalog.url.get_backend_name() != "postgresql":
        return None
    return Listener(catalog.url if url is None else make_url(url), catalog.notify)


class Listener:
    """One thread with one connection of its own.

    Args:
        url: where it listens.
        notify: sends a payload to a channel, on the way on which other processes change the catalog. A notice that
            comes back proves that both ways lead to the same database and that none is swallowed.
    """

    def __init__(self, url: URL, notify: Callable[[str, str], object]) -> None:
        self._url = url.set(drivername="postgresql+psycopg")
        self._notify = notify
        self._callbacks: defaultdict[str, list[Callable[[], object]]] = defaultdict(list)
        self._proved_at: float | None = None  # of this connection
        self._said: bool | None = None  # whether notices arrive, as it was logged last
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="f2l-listener", daemon=True)
        self._thread.start()

    @property
    def is_heard(self) -> bool:
        """Whether notices arrive; false if that was not proved lately."""
        proved_at = self._proved_at
        return proved_at is not None and time.monotonic() - proved_at < _PROOF_SECONDS + 2 * _ANSWER_SECONDS

    def on(self, payload: str, callback: Callable[[], object]) -> None:
        """Have the listener's thread call `callback` at each notice of this payload, and whenever one may have been
        missed. It must return at once."""
        self._callbacks[payload].append(callback)

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closing.is_set():
            pause = _RETRY_SECONDS
            try:
                with self._connect() as connection:
                    self._listen(connection)
            except _Unheard as error:
                self._say(False, str(error))
                pause = _UNHEARD_SECONDS
            except Exception as error:  # whatever a driver makes of a server that is gone
                self._say(False, " ".join(str(error).split()))
            self._proved_at = None
            self._closing.wait(pause)

    def _connect(self) -> psycopg.Connection[Any]:
        import psycopg  # is not installed where the catalog is SQLite

        _, arguments = self._url.get_dialect()().create_connect_args(self._url)
        return psycopg.connect(**{**arguments, **SESSION}, autocommit=True)

    def _listen(self, connection: psycopg.Connection[Any]) -> None:
        # Proofs have a channel of their own: behind a pooler a LISTEN may stay with a connection that others use.
        channel = f"{CHANNEL}_{secrets.token_hex(8)}"
        connection.execute(f"LISTEN {channel}")
        token, sent_at = "", 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            if token and now - sent_at > _ANSWER_SECONDS:
                raise _Unheard("notices do not arrive; behind a pooler in transaction mode set F2L_LISTEN_URL past it")
            if not token and (self._proved_at is None or now - self._proved_at > _PROOF_SECONDS):
                token, sent_at = secrets.token_hex(8), now
                self._notify(channel, token)
            proved = False
            for notice in connection.notifies(timeout=_SLICE_SECONDS, stop_after=1):
                if notice.channel == CHANNEL:
                    self._call(notice.payload)
                proved |= notice.payload == token
            if proved and self._proved_at is None:
                connection.execute(f"LISTEN {CHANNEL}")
                for payload in tuple(self._callbacks):
                    self._call(payload)
                self._say(True, "")
            if proved:
                token, self._proved_at = "", time.monotonic()

    def _call(self, payload: str) -> None:
        for callback in tuple(self._callbacks.get(payload, ())):
            try:
                callback()
            except Exception:
                logger.exception("a notice of %s was not understood", payload)

    def _say(self, heard: bool, reason: str) -> None:
        if heard is self._said or self._closing.is_set():
            return
        if not heard:
            logger.info("the catalog is polled for changes, many times a second: %s", reason)
        elif self._said is not None:
            logger.info("the catalog tells of its changes")
        self._said = heard
