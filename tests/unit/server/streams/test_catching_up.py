"""What is asked of each segment while a pool falls behind, dies, and catches up: every moment once, in its order."""

import itertools
import random
from dataclasses import replace

import pytest

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.server.streams import pyramid
from tests.unit.server.streams.test_pyramid import ORIGIN, SECONDS, STREAM, merged, piece

WORKERS = 3
WAITS, RUNS, READ = VideoState.UPLOADED, VideoState.ENCODING, VideoState.PROCESSED


class Simulation:
    """A stream whose segments arrive, are read by workers that may die, and are asked a standing question."""

    def __init__(self, seed, asks):
        self.asks = asks  # how often, beside the other events
        self.rng = random.Random(seed)
        self.pieces, self.arrived, self.answers, self.asked_to = [], 0, [], ORIGIN
        self.entered = {}  # by file, the order in which workers take them: those in the background last

    def run(self):
        for _ in range(6):
            speed = self.rng.choice([0.2, 1.0, 3.0])
            for _ in range(60):
                self.step([1, speed, speed, 0.1, 1, self.asks])
        while self.asked_to < ORIGIN + self.arrived * SECONDS:
            self.step([0, 1, 1, 0, 1, 1])

    def step(self, likely):
        what = self.rng.choices([self.arrive, self.claim, self.end, self.die, self.tend, self.ask], likely)
        what[0]()

    def arrive(self):
        start = self.arrived * SECONDS
        self.arrived += 1
        self.enter(piece(start, start + SECONDS, state=WAITS))

    def enter(self, one, background=False):
        self.pieces.append(one)
        self.entered[one.file_id] = (background, len(self.entered))

    def become(self, before, after, one):
        there = [one for one in self.pieces if one.file.state is before]
        if there:
            old = min(there, key=lambda one: self.entered[one.file_id]) if one == "oldest" else self.rng.choice(there)
            made = piece(0, 1).adapter if after is READ else None
            self.pieces.remove(old)
            self.pieces.append(replace(old, file=replace(old.file, state=after), adapter=made))

    def claim(self):
        if sum(one.file.state is RUNS for one in self.pieces) < WORKERS:
            self.become(WAITS, RUNS, "oldest")

    def end(self):
        self.become(RUNS, READ, "any")

    def die(self):
        self.become(RUNS, WAITS, "any")

    def tend(self, most=None):
        stream = replace(STREAM, head=ORIGIN + self.arrived * SECONDS)
        behind = pyramid.is_behind(self.pieces)
        for node in pyramid.to_make(stream, self.pieces)[:most]:
            if len(node.parts) == 1:
                self.pieces.remove(node.parts[0])
                self.pieces.append(replace(node.parts[0], level=node.level, slot=node.slot))
            else:
                self.enter(merged(node, WAITS), background=not behind)
        hurried = pyramid.to_hurry(self.pieces)
        for one in self.pieces:
            if one.file.adapter_name in hurried:
                self.entered[one.file_id] = (False, self.entered[one.file_id][1])
        for dropped in pyramid.to_drop(stream, self.pieces, ORIGIN):
            self.pieces.remove(dropped)

    def ask(self):
        for one in pyramid.following(self.pieces, self.asked_to)[: self.rng.randint(1, 8)]:
            self.answers.append((one.start, one.end))
            self.asked_to = max(self.asked_to, one.end)


@pytest.mark.parametrize("seed", range(8))
def test_every_moment_is_answered_once_and_in_order(seed):
    simulation = Simulation(seed, asks=8)
    simulation.run()
    told = simulation.answers
    assert told[0][0] == ORIGIN
    assert [before[1] for before in told[:-1]] == [after[0] for after in told[1:]]


@pytest.mark.parametrize("seed", range(8))
def test_a_question_that_lags_misses_nothing(seed):
    simulation = Simulation(seed, asks=0.02)
    simulation.run()
    told = simulation.answers
    assert told[0][0] == ORIGIN
    assert all(before[1] >= after[0] and before[1] < after[1] for before, after in itertools.pairwise(told))


@pytest.mark.parametrize("reads", [0.7, 1.0, 1.5])  # for each segment that comes; two are enough for all pieces
def test_a_stream_whose_pool_is_too_slow_stays_few_pieces(reads):
    simulation, allowed = Simulation(0, asks=0), 0.0
    for _ in range(120):
        simulation.arrive()
        simulation.tend()
        allowed += reads
        while allowed >= 1:
            simulation.claim()
            simulation.end()
            simulation.tend()
            allowed -= 1
        assert len(simulation.pieces) <= 64


@pytest.mark.parametrize("clips", [0.4, 0.7])  # for each segment that comes; one is enough for all pieces
def test_a_stream_whose_coarser_clips_are_made_too_slowly_stays_few_pieces(clips):
    simulation, allowed = Simulation(0, asks=0), 0.0
    for _ in range(160):
        simulation.arrive()
        allowed += clips
        simulation.tend(most=int(allowed))
        allowed %= 1
        for _ in range(3):
            simulation.claim()
            simulation.end()
        simulation.tend(most=0)
        assert len(simulation.pieces) <= 64
