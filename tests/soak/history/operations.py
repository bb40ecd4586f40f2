"""What a history is made of: what somebody did, when, at which server, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GRACE_SECONDS = 2.0  # after a fault is over, what met it may still fail
LATE_SECONDS = 15.0  # a worker that was given up and goes on ends its attempt, or is refused, by then
NO_ANSWER = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One of a client's, a fault, or something that was looked at.

    Attributes:
        kind: `upload`, `ask`, `content`, `delete`, `list`; `add key`, `revoke key`; `fault`; `died` (a process ended by
            itself); `calm` (all faults are over, clients have ended), `ready`, `look` (what is left of one video that
            was erased), `left` (what is left of all).
        start, end: Unix seconds.
        server: whom it was sent to, or what the fault met: `server-1`, `worker-0`, `postgres`.
        status: of HTTP; `NO_ANSWER` if the connection failed or the time was up.
        code: of the error; of a fault, what was done.
        name: the file's name, which each upload chooses anew.
        sha256: of the bytes that were uploaded, or that the answer came from.
        key: the hash of the API key that was added, revoked or sent; empty: one of the tenant's that is never revoked.
        expires_at, idle_seconds: of an upload, as it was answered and asked for.
        retry_after: whether an error said when to ask again.
        erased: of a deletion with `wait=erased`, what it said.
        found: what a list, a `look` or `left` found; the last words of one that died, or of a bug.
    """

    kind: str
    start: float
    end: float
    client: str = ""
    server: str = ""
    tenant: str = ""
    file_id: str = ""
    name: str = ""
    status: int = 200
    code: str = ""
    sha256: str = ""
    key: str = ""
    expires_at: float | None = None
    idle_seconds: float | None = None
    retry_after: bool = False
    erased: bool | None = None
    found: Any = None

    @property
    def is_done(self) -> bool:
        """Whether it was acknowledged."""
        return self.status == 200

    @property
    def is_uncertain(self) -> bool:
        """Whether it may have happened although it was not acknowledged."""
        return self.status == NO_ANSWER or self.status >= 500


def write(path: Path, operations: Iterable[Operation]) -> None:
    """As lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        for operation in operations:
            lines.write(json.dumps(asdict(operation)) + "\n")


def read(path: Path) -> list[Operation]:
    """What `write` wrote."""
    return [Operation(**json.loads(line)) for line in path.read_text().splitlines()]
