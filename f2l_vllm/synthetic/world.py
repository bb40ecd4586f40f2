"""The synthetic world the default model is trained on: one or two coloured shapes that do something.

A scene is complete on its own: it can be drawn at any size, frame rate and duration, and every question about it has
one true answer. A fixed part of the world never occurs in training: some (colour, shape, action) triples, and some
whole scenes built of known triples. A hash of their names decides which ones, so the choice needs no stored list and
is the same on every machine.

Coordinates are fractions of the frame's width and height; radii are fractions of sqrt(width * height).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 50, 190),
    "cyan": (60, 200, 215),
}
SHAPES = ("circle", "cross", "square", "triangle")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "gray": (128, 128, 128),
    "brown": (110, 70, 40),
    "pink": (245, 170, 190),
    "navy": (20, 30, 90),
}
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOVES = tuple(f"moves {direction}" for direction in DIRECTIONS)
ACTIONS = (*MOVES, "stays still", "grows", "shrinks", "blinks")
SPLITS = ("train", "held-out")

_TRIPLES_HELD_OUT_ONE_IN = 8
_SCENES_HELD_OUT_ONE_IN = 10
_BLINKS_PER_CLIP = 4  # alternating phases: visible, hidden, visible, hidden


@dataclass(frozen=True, slots=True)
class MovingShape:
    """One shape and its path through the clip. Time runs from 0 (start of the clip) to 1 (its end)."""

    colour: str
    shape: str
    action: str
    start: tuple[float, float]
    end: tuple[float, float]
    radius_start: float
    radius_end: float
    phase: float = 0.0

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.action

    @property
    def phrase(self) -> str:
        """E.g. `red circle moves left`."""
        return f"{self.colour} {self.shape} {self.action}"

    def centre(self, time: float) -> tuple[float, float]:
        (x0, y0), (x1, y1) = self.start, self.end
        return x0 + (x1 - x0) * time, y0 + (y1 - y0) * time

    def radius(self, time: float) -> float:
        return self.radius_start + (self.radius_end - self.radius_start) * time

    def visible(self, time: float) -> bool:
        return self.action != "blinks" or int(time * _BLINKS_PER_CLIP + self.phase) % 2 == 0


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two shapes, of different colour and different shape so that either names it, on a plain background."""

    shapes: tuple[MovingShape, ...]
    background: str

    @property
    def key(self) -> str:
        """What the scene shows, without exact places: equal keys have equal answers."""
        return " & ".join(shape.phrase for shape in self.shapes) + " @ " + self.background

    @property
    def held_out(self) -> bool:
        """True when training never shows this scene."""
        return self.has_unseen_triple or _one_in(_SCENES_HELD_OUT_ONE_IN, self.key)

    @property
    def has_unseen_triple(self) -> bool:
        return any(is_unseen_triple(*shape.triple) for shape in self.shapes)


@cache
def _one_in(n: int, name: str) -> bool:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % n == 0


def is_unseen_triple(colour: str, shape: str, action: str) -> bool:
    """True for the (colour, shape, action) triples that training never shows."""
    return _one_in(_TRIPLES_HELD_OUT_ONE_IN, f"{colour} {shape} {action}")


def sample_scenes(n: int, seed: int, split: str = "train") -> list[Scene]:
    """`n` independent scenes of one split; the same arguments give the same scenes.

    Raises:
        ValueError: for a split that is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}:{seed}")
    return [draw_scene(rng, split) for _ in range(n)]


def draw_scene(
    rng: random.Random, split: str = "train", *, two_shapes: float = 0.5, actions: Sequence[str] = ACTIONS
) -> Scene:
    """One scene of a split; `two_shapes` is the share of scenes with two shapes."""
    held_out = split == "held-out"
    while True:
        count = 2 if rng.random() < two_shapes else 1
        names = sorted(
            zip(rng.sample(SHAPES, count), rng.sample(list(COLOURS), count), rng.choices(actions, k=count), strict=True)
        )
        background = rng.choice(list(BACKGROUNDS))
        scene = Scene(place([(colour, shape, action) for shape, colour, action in names], rng), background)
        if scene.held_out == held_out:
            return scene


def place(triples: Sequence[tuple[str, str, str]], rng: random.Random) -> tuple[MovingShape, ...]:
    """Paths for the given (colour, shape, action) triples, with two shapes kept apart where a few draws allow it."""
    best: tuple[MovingShape, ...] = ()
    best_gap = -1.0
    for _ in range(6):
        shapes = tuple(_path(triple, rng) for triple in triples)
        gap = _gap(shapes)
        if gap > best_gap:
            best, best_gap = shapes, gap
        if gap > 0.32:
            break
    return best


def _path(triple: tuple[str, str, str], rng: random.Random) -> MovingShape:
    colour, shape, action = triple
    low, high = 0.19, 0.81
    radius_start = radius_end = rng.uniform(0.125, 0.17)
    if action in ("grows", "shrinks"):
        low, high = 0.26, 0.74
        small, large = rng.uniform(0.06, 0.085), rng.uniform(0.19, 0.23)
        radius_start, radius_end = (small, large) if action == "grows" else (large, small)
    start = [rng.uniform(low, high), rng.uniform(low, high)]
    end = list(start)
    if action in MOVES:
        dx, dy = DIRECTIONS[action.removeprefix("moves ")]
        axis, sign = (0, dx) if dx else (1, dy)
        distance = rng.uniform(0.34, 0.5)
        first = rng.uniform(low, high - distance)
        start[axis], end[axis] = (first, first + distance) if sign > 0 else (first + distance, first)
    return MovingShape(
        colour, shape, action, (start[0], start[1]), (end[0], end[1]), radius_start, radius_end, rng.random()
    )


def _gap(shapes: tuple[MovingShape, ...]) -> float:
    """The smallest distance between two shapes' centres over the clip; 1 for a single shape."""
    if len(shapes) < 2:
        return 1.0
    gap = 1.0
    for time in (0.0, 0.25, 0.5, 0.75, 1.0):
        (xa, ya), (xb, yb) = shapes[0].centre(time), shapes[1].centre(time)
        gap = min(gap, ((xa - xb) ** 2 + (ya - yb) ** 2) ** 0.5)
    return gap
