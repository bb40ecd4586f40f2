"""A real pgbouncer in transaction mode before a database of `tests.support.postgres`."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import make_url

from tests.support.postgres import unprivileged_user

_START_SECONDS = 60.0
_CONFIGURATION = """
[databases]
{name} = host={host} user=f2l
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
auth_type = any
pool_mode = transaction
default_pool_size = 5
server_login_retry = 1
"""


def find_pgbouncer() -> str | None:
    """The program, on the PATH or where Debian puts it."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextlib.contextmanager
def pooled(url: str) -> Iterator[str]:
    """The URL of the same database behind a pooler."""
    program, there = find_pgbouncer(), make_url(url)
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="f2l-pgbouncer-") as name:
        folder, options = Path(name), dict[str, Any]()
        if (user := unprivileged_user()) is not None:
            owner = pwd.getpwnam(user)
            os.chown(folder, owner.pw_uid, -1)
            options = {"user": user, "group": owner.pw_gid, "extra_groups": []}
        values = {"name": there.database, "host": there.query["host"], "folder": folder}
        (folder / "pgbouncer.ini").write_text(_CONFIGURATION.format(**values))
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([program, folder / "pgbouncer.ini"], stdout=log, stderr=log, cwd="/", **options)
        try:
            behind = f"postgresql://f2l@/{there.database}?host={folder}&port=6432"
            deadline = time.monotonic() + _START_SECONDS
            while True:
                try:
                    psycopg.connect(behind).close()
                    break
                except psycopg.OperationalError as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        text = (folder / "log").read_text()
                        raise RuntimeError(f"pgbouncer did not start: {error}\n{text[-2000:]}") from error
                time.sleep(0.05)
            yield behind
        finally:
            process.kill()
            process.wait()
