"""A real PostgreSQL server in a folder of its own, run by a user who is not root, that ends with its starter."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

_START_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def find_postgres() -> Path | None:
    """The folder with `initdb` and `postgres`: on the PATH, or the newest one where Debian puts them."""
    found = shutil.which("postgres")
    if found is not None and shutil.which("initdb") is not None:
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    return folders[-1] if folders else None


class Postgres:
    """One server, reached by a socket in its folder, or at `address` from the networks of this machine.

    `new_database` gives each test a fresh one.
    """

    def __init__(self, folder: Path, binaries: Path, address: str = "") -> None:
        self._binaries, self._folder, self._address, self._made = binaries, folder, address, 0
        self._user = unprivileged_user()
        if self._user is not None:
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, -1)
        with (folder / "initdb.log").open("w") as log:
            done = self._popen(
                log, "initdb", "-D", str(folder / "data"), "-U", "f2l", "-A", "trust", "--no-sync"
            ).wait()
        if done:
            raise RuntimeError(f"initdb failed: {Path(log.name).read_text()}")
        with (folder / "data" / "pg_hba.conf").open("a") as access:
            access.write("host all all samenet trust\n")
        self.start()

    def start(self) -> None:
        """Start the server and wait for it. As a child: it stops when this process ends, however that comes about."""
        options = (
            "-c",
            f"listen_addresses={self._address}",
            "-c",
            f"unix_socket_directories={self._folder}",
            "-c",
            "fsync=off",
        )
        with (self._folder / "log").open("a") as log:
            self.process = self._popen(log, "postgres", "-D", str(self._folder / "data"), *options)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self._connect().close()
                return
            except psycopg.OperationalError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    text = (self._folder / "log").read_text()
                    raise RuntimeError(f"PostgreSQL did not start: {error}\n{text[-2000:]}") from error
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it at once, as a crash would."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._made += 1
        name = f"test{self._made}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://f2l@/{name}?host={self._address or self._folder}"

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(host=str(self._folder), user="f2l", dbname="postgres", autocommit=True)

    def _popen(self, log: Any, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        options: dict[str, Any] = {}
        if self._user is not None:
            options = {"user": self._user, "group": pwd.getpwnam(self._user).pw_gid, "extra_groups": []}
        command = [str(self._binaries / program), *arguments]
        return subprocess.Popen(command, stdout=log, stderr=log, cwd="/", preexec_fn=_quit_with_parent, **options)


@contextmanager
def temporary_postgres(address: str = "") -> Iterator[Postgres | None]:
    """A server for a while, as `Postgres` says; None if PostgreSQL is not installed."""
    if (binaries := find_postgres()) is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="f2l-postgres-") as folder:
        postgres = Postgres(Path(folder), binaries, address)
        try:
            yield postgres
        finally:
            postgres.stop()


@contextmanager
def needed_postgres(address: str = "") -> Iterator[Postgres]:
    """As `temporary_postgres`, for programs that do nothing without one."""
    with temporary_postgres(address) as postgres:
        if postgres is None:
            raise SystemExit("PostgreSQL is needed: apt-get install postgresql")
        yield postgres


def _quit_with_parent() -> None:
    """Have Linux send SIGQUIT, PostgreSQL's order to stop at once, when the parent is gone."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def unprivileged_user() -> str | None:
    """Whom to run as: PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"
