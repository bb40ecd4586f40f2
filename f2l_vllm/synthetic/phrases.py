"""Questions about a scene, in several phrasings, and their true answers.

Some questions mention the video before or after the phrasing. Some phrasings are kept out of training (`UNSEEN`), to
see whether the model learned the question or the sentence. Both spellings, colour and color, occur.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from f2l_vllm.hypernetwork.config import INSTRUCTION
from f2l_vllm.synthetic import world
from f2l_vllm.synthetic.world import MovingShape, Scene

CAPTION = "caption"

# {it} refers to one shape of the scene, {x} is the thing whose presence is asked about.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is {it}?",
        "What color is {it}?",
        "Which colour is {it}?",
        "Which color is {it}?",
        "What is the colour of {it}?",
        "What is the color of {it}?",
        "Tell me the colour of {it}.",
        "Name the color of {it}.",
    ),
    "shape": (
        "What shape is {it}?",
        "Which shape is {it}?",
        "What is {it}?",
        "What is the shape of {it}?",
        "What kind of shape is {it}?",
        "What shape does {it} have?",
        "Tell me the shape of {it}.",
        "Name the shape of {it}.",
    ),
    "action of shape": (
        "What does {it} do?",
        "What is {it} doing?",
        "What happens to {it}?",
        "What happens with {it}?",
        "What does {it} do in the video?",
        "What do you see {it} do?",
        "Tell me what {it} does.",
        "Describe what {it} does.",
        "What action does {it} perform?",
    ),
    "action of colour": (
        "What does {it} do?",
        "What is {it} doing?",
        "What happens to {it}?",
        "What happens with {it}?",
        "What does {it} do in the video?",
        "What do you see {it} do?",
        "Tell me what {it} does.",
        "Describe what {it} does.",
        "What action does {it} perform?",
    ),
    "direction": (
        "Which way does {it} move?",
        "Which direction does {it} move?",
        "In which direction does {it} move?",
        "Which way does {it} go?",
        "Where does {it} move?",
        "Where is {it} going?",
        "What way does {it} go?",
        "Tell me which way {it} moves.",
    ),
    "count": (
        "How many shapes are there?",
        "How many objects are there?",
        "How many shapes are in the video?",
        "How many objects are in the video?",
        "How many shapes do you see?",
        "Count the shapes.",
        "How many things do you see?",
        "Tell me how many shapes there are.",
        "What is the number of shapes?",
    ),
    "background": (
        "What is the background?",
        "What colour is the background?",
        "What color is the background?",
        "Which colour is the background?",
        "What is the colour of the background?",
        "What is the background color?",
        "Which background is there?",
        "Tell me the colour of the background.",
        "Name the background color.",
    ),
    "has colour": (
        "Is there a {x} object?",
        "Is there a {x} shape?",
        "Is there anything {x}?",
        "Do you see a {x} shape?",
        "Do you see anything {x}?",
        "Is there a {x} object in the video?",
        "Can you see anything {x}?",
        "Is something {x} there?",
    ),
    "has shape": (
        "Is there a {x}?",
        "Do you see a {x}?",
        "Is there a {x} in the video?",
        "Does the video show a {x}?",
        "Can you see a {x}?",
        "Is a {x} there?",
    ),
    "has object": (
        "Is there a {x}?",
        "Do you see a {x}?",
        "Is there a {x} in the video?",
        "Does the video show a {x}?",
        "Can you see a {x}?",
        "Is a {x} there?",
    ),
    CAPTION: (
        "Describe the video.",
        "Describe this video.",
        "What happens in the video?",
        "What happens in this video?",
        "What happens?",
        "What is in the video?",
        "What do you see?",
        "What does the video show?",
        "What is this video about?",
        "Caption this video.",
        "Tell me what happens in the video.",
        "Summarize the video.",
        INSTRUCTION,
    ),
}
UNSEEN: dict[str, str] = {
    "colour": "In the video, which color is {it}?",
    "shape": "In the video, what shape is {it}?",
    "action of shape": "What do you see {it} doing?",
    "action of colour": "What do you see {it} doing?",
    "direction": "What direction does {it} go?",
    "count": "How many objects do you see in this video?",
    "background": "Which color is the background in this video?",
    "has colour": "Does the video show anything {x}?",
    "has shape": "Do you see a {x} in this video?",
    "has object": "Do you see a {x} in this video?",
    CAPTION: "Describe what happens in the video.",
}
QUESTION_TYPES = tuple(kind for kind in PHRASINGS if kind != CAPTION)
DOES_NOT_MOVE = "It does not move."
_BY_COLOUR = ("the {0} object", "the {0} shape", "the {0} one")
_NUMBERS = ("Zero", "One", "Two")
_FRAMED = 0.2  # share of questions that mention the video at their start or end
_IN_FRONT = ("In the video, ", "In this video, ", "Looking at the video, ")
_BEHIND = (" in the video", " in this video")


def questions(scene: Scene, rng: random.Random, types: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
    """One question of every type (or of the given types), each in a phrasing and about a shape drawn with `rng`.

    Returns:
        (question, true answer, type) triples, types as in `QUESTION_TYPES`.
    """
    return [ask(scene, kind, rng) for kind in (types or QUESTION_TYPES)]


def ask(scene: Scene, kind: str, rng: random.Random, *, unseen: bool = False) -> tuple[str, str, str]:
    """One question of a type about a scene: (question, true answer, type).

    Args:
        unseen: use the phrasing that training never uses.
    """
    template = UNSEEN[kind] if unseen else _frame(rng.choice(PHRASINGS[kind]), kind, rng)
    if kind == CAPTION:
        return template, caption(scene), kind
    if kind == "count":
        return template, f"{_NUMBERS[len(scene.shapes)]}.", kind
    if kind == "background":
        return template, f"{scene.background.capitalize()}.", kind
    if kind.startswith("has "):
        thing, present = _thing(scene, kind, rng)
        return template.format(x=thing), "Yes." if present else "No.", kind
    target = rng.choice(scene.shapes)
    if kind == "direction":  # a moving shape is more interesting to ask about
        moving = [shape for shape in scene.shapes if shape.action.startswith("moves ")]
        target = rng.choice(moving) if moving and rng.random() < 0.7 else target
    return template.format(it=_reference(target, kind, rng)), _answer(target, kind), kind


def _frame(template: str, kind: str, rng: random.Random) -> str:
    """The phrasing, sometimes with a mention of the video added; never to one that is kept out of training."""
    if "video" in template or kind == CAPTION or rng.random() >= _FRAMED:
        return template
    framed = rng.choice([*_in_front(template), *_behind(template)])
    return template if framed in UNSEEN.values() else framed


def _in_front(template: str) -> list[str]:
    return [f"{words}{template[0].lower()}{template[1:]}" for words in _IN_FRONT]


def _behind(template: str) -> list[str]:
    return [f"{template[:-1]}{words}{template[-1]}" for words in _BEHIND]


def caption(scene: Scene) -> str:
    """E.g. `A red circle moves left and a blue square grows on a black background.`"""
    shapes = " and ".join(f"a {shape.phrase}" for shape in scene.shapes)
    return f"{shapes[0].upper()}{shapes[1:]} on a {scene.background} background."


def roughen(question: str, rng: random.Random) -> str:
    """The question as people also type it: in lower case, without its final mark, or both."""
    style = rng.randrange(3)
    question = question.lower() if style != 1 else question
    return question.rstrip("?.") if style != 0 else question


def corpus() -> Iterator[str]:
    """Every sentence of the world's language at least once, for the tokenizer."""
    colours, shapes, backgrounds = list(world.COLOURS), world.SHAPES, list(world.BACKGROUNDS)
    references = [*(f"the {shape}" for shape in shapes), *(f"the {c} {s}" for c in colours for s in shapes)]
    references += [form.format(colour) for form in _BY_COLOUR for colour in colours]
    things = [*colours, *shapes, *(f"{colour} {shape}" for colour in colours for shape in shapes)]
    questions = []
    for kind in PHRASINGS:
        for template in (*PHRASINGS[kind], UNSEEN[kind], *_in_front(PHRASINGS[kind][0]), *_behind(PHRASINGS[kind][0])):
            fill = references if "{it}" in template else things if "{x}" in template else [""]
            questions += [template.format(it=word, x=word) for word in fill]
    for question in questions:
        yield from (question, f" {question}", question.lower(), f" {question.lower()}")
    answers = [*(f"{word.capitalize()}." for word in (*colours, *backgrounds, *_NUMBERS)), "Yes.", "No."]
    answers += [f"A {shape}." for shape in shapes] + [DOES_NOT_MOVE]
    answers += [f"The {c} {s} {a}." for c in colours for s in shapes for a in world.ACTIONS]
    answers += [f"{direction.capitalize()}." for direction in world.DIRECTIONS]
    answers += [f"A {c} {s} {a} and a {c} {s} {a} on a" for c in colours for s in shapes for a in world.ACTIONS]
    answers += [f"on a {background} background." for background in backgrounds]
    for answer in answers:
        yield from (answer, f" {answer}")


def _reference(target: MovingShape, kind: str, rng: random.Random) -> str:
    """How a question names its shape, without giving the answer away."""
    by_colour = rng.choice(_BY_COLOUR).format(target.colour)
    if kind == "shape":
        return by_colour
    if kind == "colour":
        return f"the {target.shape}"
    forms = {"action of shape": 0, "action of colour": 1}
    form = forms.get(kind, rng.randrange(2))
    if rng.random() < 0.2:
        return f"the {target.colour} {target.shape}"
    return by_colour if form else f"the {target.shape}"


def _answer(target: MovingShape, kind: str) -> str:
    if kind == "colour":
        return f"{target.colour.capitalize()}."
    if kind == "shape":
        return f"A {target.shape}."
    if kind == "direction":
        if not target.action.startswith("moves "):
            return DOES_NOT_MOVE
        return f"{target.action.removeprefix('moves ').capitalize()}."
    # A whole sentence: the model writes the name first and then finds the action after its shape, as in a caption.
    return f"The {target.phrase}."


def _thing(scene: Scene, kind: str, rng: random.Random) -> tuple[str, bool]:
    """A thing to ask about, present in half of the questions, and whether it is present.

    An absent thing shares its colour or its shape with a present one, so that recognising one of the two is not enough.
    """
    present = rng.random() < 0.5
    colours = [shape.colour for shape in scene.shapes]
    shapes = [shape.shape for shape in scene.shapes]
    if kind == "has colour":
        return rng.choice(colours if present else [c for c in world.COLOURS if c not in colours]), present
    if kind == "has shape":
        return rng.choice(shapes if present else [s for s in world.SHAPES if s not in shapes]), present
    pairs = list(zip(colours, shapes, strict=True))
    if not present:
        near = [(c, s) for c in world.COLOURS for s in world.SHAPES if (c in colours) != (s in shapes)]
        crossed = [(c, s) for c in colours for s in shapes if (c, s) not in pairs]
        pairs = crossed if crossed and rng.random() < 0.3 else near
    return " ".join(rng.choice(pairs)), present
