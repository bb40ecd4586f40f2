"""Which of several servers answers a question about a video: the policies of a router in front of them.

A policy decides costs alone, because every server answers every video. It counts questions, not tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from f2l_vllm.rendezvous import order

BOUND = 1.25  # of the mean number of questions in work, for HAProxy in percent: `hash-balance-factor 125`
_WARM_BOUND = 1.5
_LOOK = 6
_POINTS = 16  # of each server on HAProxy's ring, at its usual weight
_NUMBERS = 4096  # HAProxy's range of points for one server
_WORD = 0xFFFFFFFF


class Policy(Protocol):
    """Chooses a server for each question."""

    def choose(self, video: str, loads: Mapping[str, int]) -> str:
        """The server to ask.

        Args:
            video: names the adapter that answers.
            loads: questions in work at each server that is ready, at least one server, always in the same order.
        """


class Recent:
    """The last `size` names: whichever was not named longest makes room."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._names: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def full(self) -> bool:
        """Whether a new name makes another one leave."""
        return len(self._names) >= self._size

    def add(self, name: str) -> bool:
        """Name it; True if it was among them."""
        known = name in self._names
        self._names[name] = None
        if known:
            self._names.move_to_end(name)
        elif len(self._names) > self._size:
            self._names.popitem(last=False)
        return known


class LeastLoaded:
    """The server with the fewest questions in work; of several, the one that was chosen longest ago."""

    def __init__(self) -> None:
        self._turns = 0
        self._last: dict[str, int] = {}

    def choose(self, video: str, loads: Mapping[str, int]) -> str:
        """See `Policy`; the video does not matter."""
        server = min(loads, key=lambda name: (loads[name], self._last.get(name, 0)))
        self._turns += 1
        self._last[server] = self._turns
        return server


class HAProxyHash:
    """The server that stock HAProxy picks: a ring of hashes, and the next server on it while one is above its bound.

    The questions in work, this one included, times `BOUND`, rounded up, are dealt to the servers in turn; nobody gets
    more than was dealt to it. Equal weights; as `balance hash` with `hash-type consistent sdbm avalanche` and
    `hash-balance-factor 125`.

    Args:
        servers: all that the backend names, in its order: their numbers are hashed, not their names.

    Source: HAProxy 2.6, its configuration manual and what it was seen to do.
    """

    def __init__(self, servers: Sequence[str]) -> None:
        self._numbers = {server: number for number, server in enumerate(servers, 1)}

    def choose(self, video: str, loads: Mapping[str, int]) -> str:
        """See `Policy`."""
        points, owners = _ring(tuple(self._numbers[server] for server in loads))
        names = list(loads)
        dealt = math.ceil((sum(loads.values()) + 1) * BOUND)
        at = _nearest(_hash(video), points)
        for step in range(len(owners)):
            place = owners[(at + step) % len(owners)]
            share = (place + 1) * dealt // len(names) - place * dealt // len(names)
            if loads[names[place]] < max(1, share):
                return names[place]
        raise AssertionError("more was dealt than is in work")


class WarmFirst:
    """Bounded rendezvous hashing that sends what does not fit at a video's home to where it was sent lately.

    The home, while its load is below the bound; else the least loaded of the next five servers that are below it and
    were asked about this video lately; else the home, below a looser bound, if it was; else the next in order below the
    bound. The bound is `BOUND` times the mean, or half of what a server answers at a time, if that is more: with little
    to do nobody needs relief. What was sent stands for what is resident, so servers need not say.

    Args:
        places: adapters that a server holds in memory.
        concurrency: questions that a server answers at a time.

    Source: Mirrokni, Thorup and Zadimoghaddam, Consistent Hashing with Bounded Loads, 2018.
    """

    def __init__(self, places: int, concurrency: int) -> None:
        self._places, self._floor = places, concurrency // 2
        self._sent: dict[str, Recent] = {}

    def choose(self, video: str, loads: Mapping[str, int]) -> str:
        """See `Policy`."""
        server = self._choose(video, loads)
        self._sent.setdefault(server, Recent(self._places)).add(video)
        if len(self._sent) > len(loads):
            self._sent = {name: sent for name, sent in self._sent.items() if name in loads}
        return server

    def _choose(self, video: str, loads: Mapping[str, int]) -> str:
        home, *others = ordered = order(video, tuple(loads))
        mean = (sum(loads.values()) + 1) / len(loads)
        bound, warm_bound = (max(self._floor, math.ceil(factor * mean)) for factor in (BOUND, _WARM_BOUND))
        if loads[home] < bound:
            return home
        warm = [name for name in others[: _LOOK - 1] if loads[name] < bound and self._is_warm(video, name)]
        if warm:
            return min(warm, key=loads.__getitem__)
        if loads[home] < warm_bound and self._is_warm(video, home):
            return home
        return next(name for name in ordered if loads[name] < bound)  # all cannot be above their mean

    def _is_warm(self, video: str, server: str) -> bool:
        return server in self._sent and video in self._sent[server]


@lru_cache(maxsize=64)
def _ring(numbers: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Points of the ring in order, and for each whose it is, as a place in `numbers`."""
    points = sorted(
        (_scattered(number * _NUMBERS + point), place)
        for place, number in enumerate(numbers)
        for point in range(_POINTS)
    )
    return [point for point, _ in points], [place for _, place in points]


def _nearest(value: int, points: list[int]) -> int:
    """The index of the point nearest to `value` on the ring; of two the one before it."""
    after = bisect_left(points, value) % len(points)
    before = after - 1
    return before if (value - points[before]) & _WORD <= (points[after] - value) & _WORD else after


@lru_cache(maxsize=1 << 16)
def _hash(name: str) -> int:
    """sdbm's hash of 32 bits, scattered."""
    value = 0
    for byte in name.encode():
        value = (value * 65599 + byte) & _WORD
    return _scattered(value)


def _scattered(value: int) -> int:
    """Every bit of the 32 depends on every bit of `value`. Source: Jenkins, 4-byte integer hashing, six shifts."""
    value = (value + 0x7ED55D16 + (value << 12)) & _WORD
    value = value ^ 0xC761C23C ^ (value >> 19)
    value = (value + 0x165667B1 + (value << 5)) & _WORD
    value = ((value + 0xD3A2646C) ^ (value << 9)) & _WORD
    value = (value + 0xFD7046C5 + (value << 3)) & _WORD
    value = value ^ 0xB55A4F09 ^ (value >> 16)
    return value * 3221225473 & _WORD
