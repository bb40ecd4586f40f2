"""Questions are asked in many words and every answer is true."""

import random
import re
from collections import Counter

import pytest

from f2l_vllm.synthetic import phrases, world

_WORDS = (*world.COLOURS, *world.SHAPES)


def _asked(kind: str, *, unseen: bool = False, count: int = 400) -> list[tuple[world.Scene, str, str]]:
    rng = random.Random(kind)
    scenes = world.sample_scenes(count, 11)
    return [(scene, *phrases.ask(scene, kind, rng, unseen=unseen)[:2]) for scene in scenes]


def _meant(scene: world.Scene, question: str) -> list[world.MovingShape]:
    """The shapes all of whose names in the question are true of: read from the words, not from how it was made."""
    named = set(re.findall(r"[a-z]+", question.lower())) & set(_WORDS)
    return [shape for shape in scene.shapes if named <= {shape.colour, shape.shape}]


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("kind", ["colour", "shape", "action of shape", "action of colour", "direction"])
def test_answers_about_a_shape_are_true_of_exactly_the_one_named(kind, unseen):
    for scene, question, answer in _asked(kind, unseen=unseen):
        meant = _meant(scene, question)
        assert len(meant) == 1, question
        (shape,) = meant
        moves = shape.action.startswith("moves")
        truth = {
            "colour": f"{shape.colour.title()}.",
            "shape": f"A {shape.shape}.",
            "direction": f"{shape.action.split()[1].title()}." if moves else "It does not move.",
        }.get(kind, f"The {shape.phrase}.")
        assert answer == truth
        given_away = {"colour": shape.colour, "shape": shape.shape}.get(kind)
        assert given_away is None or given_away not in question


@pytest.mark.parametrize("kind", ["has colour", "has shape", "has object"])
def test_yes_means_that_something_in_the_scene_is_all_of_what_is_asked(kind):
    answers = Counter()
    for scene, question, answer in _asked(kind, count=1000):
        assert answer == ("Yes." if _meant(scene, question) else "No."), question
        answers[answer] += 1
    assert 0.42 < answers["Yes."] / 1000 < 0.58


def test_absent_objects_share_a_property_with_one_that_is_there():
    for scene, question, answer in _asked("has object"):
        if answer == "No.":
            named = set(re.findall(r"[a-z]+", question)) & set(_WORDS)
            assert any(named & {shape.colour, shape.shape} for shape in scene.shapes)


def test_count_and_background():
    for scene, _, answer in _asked("count"):
        assert answer == {1: "One.", 2: "Two."}[len(scene.shapes)]
    for scene, _, answer in _asked("background"):
        assert answer == f"{scene.background.title()}."


def test_caption_names_every_shape_once_and_the_background():
    for scene in world.sample_scenes(200, 1):
        caption = phrases.caption(scene)
        assert caption[0] == "A"
        assert caption.endswith(f" on a {scene.background} background.")
        for shape in scene.shapes:
            assert caption.lower().count(f"a {shape.colour} {shape.shape} {shape.action}") == 1


@pytest.mark.parametrize("kind", phrases.QUESTION_TYPES)
def test_training_never_asks_in_the_words_kept_for_evaluation(kind):
    kept = re.compile(re.escape(phrases.UNSEEN[kind]).replace(r"\{it\}", ".+").replace(r"\{x\}", ".+"), re.IGNORECASE)
    asked = [question for _, question, _ in _asked(kind, count=3000)]
    assert not [question for question in asked if kept.fullmatch(question)]
    assert all(kept.fullmatch(question) for _, question, _ in _asked(kind, unseen=True, count=20))


def test_some_questions_mention_the_video_before_or_after_the_rest():
    asked = [question for _, question, _ in _asked("colour", count=2000)]
    before = [question for question in asked if question.startswith(("In the video, ", "In this video, ", "Looking"))]
    after = [question for question in asked if question.endswith(("in the video?", "in this video?", "video."))]
    assert 0.05 < len(before) / 2000 < 0.2
    assert 0.02 < len(after) / 2000 < 0.2


def test_a_scene_asks_one_question_of_every_type():
    scene = world.sample_scenes(1, 0)[0]
    asked = phrases.questions(scene, random.Random(0))
    assert [kind for _, _, kind in asked] == list(phrases.QUESTION_TYPES)
    assert phrases.questions(scene, random.Random(0)) == asked


def test_roughening_changes_nothing_but_case_and_the_last_mark():
    rng = random.Random(0)
    forms = {phrases.roughen("What colour is the circle?", rng) for _ in range(50)}
    assert forms == {"what colour is the circle?", "What colour is the circle", "what colour is the circle"}
