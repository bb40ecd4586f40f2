"""Reads a segment to its end although its sender has hung up already.

ffmpeg puts a segment, closes the connection and reads no answer. Uvicorn then says that the client has gone, and keeps
the last bytes, which it has, to itself. Source: uvicorn 0.54, `RequestResponseCycle.receive` in
`protocols/http/httptools_impl.py` and `h11_impl.py`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from uvicorn.protocols.http import h11_impl

_PUSHED = re.compile("/v1/streams/[^/]*/push/.*")
_MARK = "f2l_has_given_all"


def install() -> None:
    """Let every connection of this process give the whole body of a pushed segment, once."""
    cycles: list[Any] = [h11_impl.RequestResponseCycle]
    try:
        from uvicorn.protocols.http import httptools_impl

        cycles.append(httptools_impl.RequestResponseCycle)
    except ImportError:  # then uvicorn uses the other one
        pass
    for cycle in cycles:
        if not hasattr(cycle.receive, "__wrapped__"):
            cycle.receive = _patient(cycle.receive)


def _patient(receive: Any) -> Any:
    @functools.wraps(receive)
    async def patient(cycle: Any) -> Any:
        message = await receive(cycle)
        if message["type"] == "http.request":
            setattr(cycle, _MARK, not message["more_body"])
            return message
        is_here = cycle.disconnected and not cycle.more_body and not getattr(cycle, _MARK, False)
        if not is_here or not _PUSHED.search(cycle.scope["path"]):
            return message
        setattr(cycle, _MARK, True)
        body, cycle.body = bytes(cycle.body), bytearray()
        return {"type": "http.request", "body": body, "more_body": False}

    return patient
