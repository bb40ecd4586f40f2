"""Which of Ray's daemons a private Ray runs: those that start actors and pass on their events, and no others.

Ray offers no setting for this. Its autoscaler, log monitor and dashboard are Python processes that serve clusters and
browsers; starting them takes seconds of CPU time, for some of which the workers wait. These are internals of Ray 2.60;
a Ray without these methods starts all its daemons.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private.node import Node

LEFT_OUT = ("start_monitor", "start_log_monitor", "start_api_server")
EXTRA = "ray.dashboard.optional_deps"  # imports what `ray[default]` adds; without that extra, agents serve less


@contextmanager
def few_daemons() -> Iterator[None]:
    """A Ray that is started inside runs without autoscaler, log monitor and dashboard, and its agents as if Ray was
    installed without the extra `default`."""
    usual = {name: getattr(Node, name) for name in LEFT_OUT if hasattr(Node, name)}
    modules: dict[str, Any] = sys.modules
    imported = modules.pop(EXTRA, None)
    modules[EXTRA] = None  # importing it raises ImportError
    for name in usual:
        setattr(Node, name, _nothing)
    try:
        yield
    finally:
        for name, method in usual.items():
            setattr(Node, name, method)
        del modules[EXTRA]
        if imported is not None:
            modules[EXTRA] = imported


def _nothing(*_: Any, **__: Any) -> None:
    pass
