"""What one front knows of the engines: where they are, and how much each has to do.

Ray Serve's router, which runs in a thread of its own, says which engines there are. The relay says what it has sent
them, and what they say of themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from f2l_vllm.cluster.policy import LeastLoaded, Policy, WarmFirst

_HEARD_SECONDS = 2.0  # what an engine said of itself counts so long
_SUSPECT_SECONDS = 5.0  # longer than it takes Ray to notice that a process has ended


@dataclass
class _Engine:
    url: str
    sent: int = 0  # questions of this front's in work there
    others: int = 0  # questions of all others, when it was last heard of
    heard_at: float = -_HEARD_SECONDS
    suspect_until: float = 0.0

    def load(self, now: float) -> int:
        return self.sent + (self.others if now < self.heard_at + _HEARD_SECONDS else 0)


class Membership:
    """Engines by name. Any thread may call its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[str, _Engine] = {}

    def update(self, urls: Mapping[str, str]) -> None:
        """These engines are there, and no others. One with another address is another engine."""
        with self._lock:
            known = self._engines
            self._engines = {
                name: known[name] if name in known and known[name].url == url else _Engine(url)
                for name, url in sorted(urls.items())
            }

    def urls(self) -> dict[str, str]:
        """The engines' addresses."""
        with self._lock:
            return {name: engine.url for name, engine in self._engines.items()}

    def loads(self, tried: Collection[str] = ()) -> dict[str, int]:
        """Questions in work at each engine that may be asked, in the order of their names.

        An engine that was `tried` or has lately failed is left out, unless there is no other.
        """
        now = time.monotonic()
        with self._lock:
            sound = {name: one for name, one in self._engines.items() if one.suspect_until <= now}
            fresh = {name: one for name, one in sound.items() if name not in tried}
            return {name: one.load(now) for name, one in (fresh or sound or self._engines).items()}

    def begin(self, name: str) -> None:
        """A question goes to this engine."""
        self._count(name, 1)

    def end(self, name: str) -> None:
        """The question has ended."""
        self._count(name, -1)

    def _count(self, name: str, more: int) -> None:
        with self._lock:
            if (engine := self._engines.get(name)) is not None:
                engine.sent = max(0, engine.sent + more)  # it may have come back as another one meanwhile

    def heard(self, name: str, load: int) -> None:
        """The engine has said how many questions it has; this front's own are among them."""
        with self._lock:
            if (engine := self._engines.get(name)) is not None:
                engine.others, engine.heard_at = max(0, load - engine.sent), time.monotonic()
                engine.suspect_until = 0.0

    def suspect(self, name: str) -> None:
        """The engine did not answer: others are asked first for some seconds."""
        with self._lock:
            if (engine := self._engines.get(name)) is not None:
                engine.suspect_until = time.monotonic() + _SUSPECT_SECONDS


class Affinity:
    """Questions about a video go to its home, or where it is warm; requests about none to whoever has least to do.

    Args:
        places: adapters that an engine holds in memory.
        concurrency: questions that it answers at a time.
    """

    def __init__(self, engines: Membership, places: int, concurrency: int) -> None:
        self._engines = engines
        self._affine: Policy = WarmFirst(places, concurrency)
        self._any: Policy = LeastLoaded()

    def choose(self, key: str, tried: Collection[str]) -> str | None:
        """The engine to ask, by name; None if there is none.

        Args:
            key: names the videos of a question; empty: there are none.
            tried: engines that were asked already.
        """
        loads = self._engines.loads(tried)
        return (self._affine if key else self._any).choose(key, loads) if loads else None


ENGINES = Membership()  # of the front that runs in this process
