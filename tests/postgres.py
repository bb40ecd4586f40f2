"""A real PostgreSQL server in a folder of its own, run by a user who is not root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import psycopg


def find_postgres() -> Path | None:
    """The folder with `initdb` and `pg_ctl`: on the PATH, or the newest one where Debian puts them."""
    found = shutil.which("pg_ctl")
    if found is not None and shutil.which("initdb") is not None:
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    return folders[-1] if folders else None


class Postgres:
    """One server, reached by a socket in its folder; `new_database` gives each test a fresh one."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._binaries, self._folder, self._made = binaries, folder, 0
        self._user = _unprivileged_user()
        if self._user is not None:
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._run("initdb", "-D", str(folder / "data"), "-U", "f2l", "-A", "trust", "--no-sync")
        self.start()

    def start(self) -> None:
        """Start the server and wait for it."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c fsync=off"
        log = str(self._folder / "log")
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        """Stop it at once, as a crash would."""
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-w", "-m", "immediate", "stop")

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._made += 1
        name = f"test{self._made}"
        with psycopg.connect(host=str(self._folder), user="f2l", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://f2l@/{name}?host={self._folder}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        options = {} if self._user is None else {"user": self._user, "group": pwd.getpwnam(self._user).pw_gid}
        with (self._folder / "out").open("w") as out:
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd="/", check=False, **options)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {Path(out.name).read_text()}")


def _unprivileged_user() -> str | None:
    """Whom to run as: PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"
