"""Several servers under a policy, simulated: who answers which question from memory, and how long first tokens take.

A server answers so many questions at a time; more wait there, in order. A question whose adapter is not in memory has
it loaded between two steps, in which every question in work at that server stands still; if the server has no local
copy, the question, and no other, first waits for the object store. Memory and copies keep what was used last.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from f2l_vllm.cluster.policy import Policy, Recent

_MEMORY, _COPY, _STORE = "memory", "copy", "store"
_SETTLED = 0.005  # of the questions still fill a cache
_SETTLE_AT_MOST = 1_000_000


@dataclass(frozen=True)
class Scenario:
    """The questions and the servers.

    Attributes:
        servers: how many.
        videos: how many are asked about; `zipf`: the n-th most popular as often as 1 / n ** zipf, 0: all alike.
        rate: questions a second, to all servers, at random moments (Poisson). None: clients that always have one in
            work each, `clients` of them, or without a number as many as the servers answer at a time.
        places: adapters in a server's memory; `copies`: adapters on its disk.
        concurrency: questions that a server answers at a time.
        first_token_s, answer_s: seconds to the first token and to the last one, of an adapter in memory.
        load_s: from the disk into memory; `fetch_s`: from the object store to the disk.

    Raises:
        ValueError: a figure is out of range.
    """

    servers: int
    videos: int
    zipf: float = 0.9
    rate: float | None = None
    clients: int | None = None
    places: int = 256
    copies: int = 2000
    concurrency: int = 32
    first_token_s: float = 0.06
    answer_s: float = 0.36
    load_s: float = 0.001
    fetch_s: float = 0.05

    def __post_init__(self) -> None:
        least_one = ("servers", "videos", "places", "concurrency")
        for name in (*least_one, "copies", "zipf", "first_token_s", "load_s", "fetch_s"):
            value, least = getattr(self, name), int(name in least_one)
            if not least <= value < math.inf:
                raise ValueError(f"{name} is {value}: give a number from {least} on")
        for name in ("rate", "clients"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: give a number above 0, or none for servers that always have work")
        if self.rate is not None and self.clients is not None:
            raise ValueError("rate and clients are two ways to ask: give one of them")
        if not 0 < self.first_token_s <= self.answer_s < math.inf:
            raise ValueError(f"an answer of {self.answer_s} s cannot have its first token after {self.first_token_s} s")

    @property
    def names(self) -> tuple[str, ...]:
        """The servers'."""
        return tuple(f"server-{number}" for number in range(1, self.servers + 1))

    @property
    def ideal(self) -> float:
        """Questions a second of all servers, if every adapter were in memory and nobody idle."""
        return self.servers * self.concurrency / self.answer_s

    @property
    def in_work(self) -> int:
        """Questions in work at a time, about, if nothing has to be loaded."""
        if self.rate is not None:
            return max(1, round(self.rate * self.answer_s))
        return self.clients or self.servers * self.concurrency


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        hit_rate: share of the questions whose adapter was in memory; `store_share`: whose adapter came from the store.
        added_median_ms, added_p99_ms: to the first token, over `first_token_s`, waiting for a free place included.
        throughput: questions a second.
        imbalance: questions of the busiest server over the mean.
        settled: whether caches were as full as they get when it began.
    """

    hit_rate: float
    store_share: float
    added_median_ms: float
    added_p99_ms: float
    throughput: float
    imbalance: float
    settled: bool


class Popularity:
    """Videos by name, and questions about them."""

    def __init__(self, videos: int, zipf: float, rng: np.random.Generator) -> None:
        self._names = [f"video-{number}" for number in rng.permutation(videos)]
        self._shares = np.cumsum(np.arange(1, videos + 1, dtype=float) ** -zipf)
        self._rng = rng

    def draw(self, count: int) -> list[str]:
        """The videos of the next `count` questions."""
        drawn = np.searchsorted(self._shares, self._rng.random(count) * self._shares[-1], side="right")
        return [self._names[index] for index in drawn]


@dataclass
class _Server:
    memory: Recent
    copies: Recent
    running: int = 0
    stood_still: float = 0.0  # seconds, since the beginning
    waiting: deque[_Question] = field(default_factory=deque)

    def use(self, video: str) -> tuple[str, bool]:
        """Where its adapter came from, and whether that filled a cache which was not full."""
        memory_was_full, copies_were_full = self.memory.full, self.copies.full
        if self.memory.add(video):
            return _MEMORY, False
        if self.copies.add(video):
            return _COPY, not memory_was_full
        return _STORE, not (memory_was_full and copies_were_full)


@dataclass(slots=True)
class _Question:
    arrived: float
    video: str = ""
    server: str = ""
    source: str = _MEMORY
    seen: float = 0.0  # of its server's standing still


class Simulation:
    """One run.

    Args:
        policy: a new one, which knows of nothing yet.
        seed: of the questions; the same seed, the same outcome.
    """

    def __init__(self, scenario: Scenario, policy: Policy, seed: int) -> None:
        self._scenario, self._policy = scenario, policy
        self._rng = np.random.default_rng(seed)
        self._popularity = Popularity(scenario.videos, scenario.zipf, self._rng)
        self._servers = {name: _Server(Recent(scenario.places), Recent(scenario.copies)) for name in scenario.names}
        self._loads = dict.fromkeys(self._servers, 0)
        self._events: list[tuple[float, int, Callable[[float, _Question], None], _Question]] = []
        self._numbers = itertools.count()
        self._videos: list[str] = []  # still to be asked about, the next one last
        self._ends: list[float] = []
        self._fed = 0  # answers that had ended when the last question came
        self._uncounted = 0
        self._sources: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()
        self._added: list[float] = []

    def run(self, questions: int | None = None, warm_up: int | None = None) -> Outcome:
        """Fill the caches, then ask.

        Args:
            questions: how many; the first quarter is not counted. By default enough for a 99th percentile, and never
                fewer than eight times those in work.
            warm_up: questions that fill the caches; by default until they are as full as they get, a million at most.
        """
        scenario = self._scenario
        count = max(questions or max(10_000, 250 * scenario.servers), 8 * scenario.in_work)
        self._uncounted = count // 4
        settled = self._warm_up(warm_up)
        self._videos = self._popularity.draw(count)
        if scenario.rate is not None:
            moments = np.cumsum(self._rng.exponential(1 / scenario.rate, count))
        else:
            moments = self._rng.random(min(count, scenario.in_work)) * scenario.answer_s
        for moment in moments.tolist():
            self._push(moment, self._arrive, _Question(moment))
        while self._events:
            now, _, happen, question = heapq.heappop(self._events)
            happen(now, question)
        return self._outcome(settled)

    def _warm_up(self, questions: int | None) -> bool:
        """Choose and use, with as many questions in work as there will be, but no time. Whether the caches are full."""
        batch = max(2000, 200 * self._scenario.servers) if questions is None else questions
        in_work: deque[str] = deque()
        settled = False
        for _ in range(_SETTLE_AT_MOST // batch if questions is None else 1):
            filled = 0
            for video in self._popularity.draw(batch):
                server = self._policy.choose(video, self._loads)
                self._loads[server] += 1
                in_work.append(server)
                if len(in_work) >= self._scenario.in_work:
                    self._loads[in_work.popleft()] -= 1
                filled += self._servers[server].use(video)[1]
            if settled := filled <= _SETTLED * batch:
                break
        self._loads.update(dict.fromkeys(self._loads, 0))
        return settled

    def _push(self, moment: float, happen: Callable[[float, _Question], None], question: _Question) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), happen, question))

    def _arrive(self, now: float, question: _Question) -> None:
        question.video = self._videos.pop()
        question.server = self._policy.choose(question.video, self._loads)
        self._fed = len(self._ends)
        self._loads[question.server] += 1
        server = self._servers[question.server]
        if server.running < self._scenario.concurrency:
            self._start(now, question, server)
        else:
            server.waiting.append(question)

    def _start(self, now: float, question: _Question, server: _Server) -> None:
        server.running += 1
        question.source, _ = server.use(question.video)
        if question.source != _MEMORY:
            server.stood_still += self._scenario.load_s
            now += self._scenario.load_s
        if question.source == _STORE:
            now += self._scenario.fetch_s
        question.seen = server.stood_still
        self._push(now + self._scenario.first_token_s, self._first, question)

    def _stands_still(self, now: float, happen: Callable[[float, _Question], None], question: _Question) -> bool:
        """Whether its server has stood still meanwhile, so that this happens as much later."""
        stood_still = self._servers[question.server].stood_still
        late = stood_still - question.seen
        if late > 0:
            question.seen = stood_still
            self._push(now + late, happen, question)
        return late > 0

    def _first(self, now: float, question: _Question) -> None:
        if self._stands_still(now, self._first, question):
            return
        if len(self._ends) >= self._uncounted:
            self._added.append(now - question.arrived - self._scenario.first_token_s)
            self._sources[question.source] += 1
            self._answered[question.server] += 1
        self._push(now + self._scenario.answer_s - self._scenario.first_token_s, self._last, question)

    def _last(self, now: float, question: _Question) -> None:
        if self._stands_still(now, self._last, question):
            return
        server = self._servers[question.server]
        server.running -= 1
        self._loads[question.server] -= 1
        self._ends.append(now)
        if server.waiting:
            self._start(now, server.waiting.popleft(), server)
        if self._scenario.rate is None and self._videos:
            self._arrive(now, _Question(now))

    def _outcome(self, settled: bool) -> Outcome:
        counted = len(self._added)
        median, p99 = np.quantile(self._added, (0.5, 0.99)) * 1e3
        seconds = self._ends[self._fed - 1] - self._ends[self._uncounted - 1]
        return Outcome(
            hit_rate=self._sources[_MEMORY] / counted,
            store_share=self._sources[_STORE] / counted,
            added_median_ms=float(median),
            added_p99_ms=float(p99),
            throughput=(self._fed - self._uncounted) / seconds,
            imbalance=max(self._answered.values()) * self._scenario.servers / counted,
            settled=settled,
        )
