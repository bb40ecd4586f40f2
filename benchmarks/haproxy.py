"""HAProxy with `launch/haproxy.cfg` in front of some servers, for measurements."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_CONFIG = Path(__file__).parents[1] / "launch" / "haproxy.cfg"


def find_haproxy() -> str | None:
    """The program, on the PATH or where Debian puts it."""
    return shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")


def haproxy_version() -> str:
    """Of the program that is used, which has to be there."""
    return subprocess.run([find_haproxy() or "haproxy", "-v"], capture_output=True, text=True).stdout.split()[2]


@contextmanager
def haproxy(
    servers: Sequence[str], bind: str | Path, folder: Path, balance: str | None = None, reloads: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """HAProxy for as long as the block lasts; `folder` gets its `haproxy.log`.

    Args:
        servers: `host:port`; they are called s1, s2 and so on.
        bind: where it listens: an address with its port, or a socket.
        balance: instead of what questions have in its configuration.
        reloads: whether it reads its configuration again on SIGUSR2, as the service of a distribution does.
    """
    program, config = find_haproxy(), folder / "haproxy.cfg"
    if program is None:
        raise SystemExit("HAProxy is needed: apt-get install haproxy")
    lines = "".join(f"    server s{number} {server}\\2\n" for number, server in enumerate(servers, 1))
    text = re.sub(r"(    server \w+ [\d.:]+(.*)\n)+", lines, _CONFIG.read_text())
    if balance is not None:
        text = re.sub(r"    balance hash.*\n(    hash-.*\n)+", f"    balance {balance}\n", text)
    config.write_text(text)
    command = [program, *(["-W"] if reloads else []), "-f", str(config)]
    with (folder / "haproxy.log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env={"BIND": str(bind)})
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def proxied(servers: Sequence[str], folder: Path, balance: str | None = None) -> Iterator[Path]:
    """As `haproxy`, at a socket that exists."""
    socket = folder / "haproxy.sock"
    with haproxy(servers, socket, folder, balance) as process:
        while not socket.exists():
            if process.poll() is not None:
                raise SystemExit(f"HAProxy ended: {(folder / 'haproxy.log').read_text()}")
            time.sleep(0.05)
        yield socket
