"""The world is the same everywhere, its splits do not overlap, and its paths do what their action says."""

import math

import pytest

from f2l_vllm.synthetic import world


def test_same_arguments_give_the_same_scenes_and_other_seeds_give_others():
    assert world.sample_scenes(50, 3, "held-out") == world.sample_scenes(50, 3, "held-out")
    assert world.sample_scenes(50, 3) != world.sample_scenes(50, 4)


def test_splits_share_no_scene():
    train = {scene.key for scene in world.sample_scenes(4000, 0, "train")}
    held_out = {scene.key for scene in world.sample_scenes(2000, 1, "held-out")}
    assert not train & held_out


def test_no_training_scene_shows_a_held_out_triple_and_most_held_out_scenes_do():
    assert not any(scene.has_unseen_triple for scene in world.sample_scenes(2000, 0, "train"))
    held_out = world.sample_scenes(1000, 0, "held-out")
    share = sum(scene.has_unseen_triple for scene in held_out) / len(held_out)
    assert 0.4 < share < 0.9  # the others are unseen as a whole, of seen triples


def test_every_colour_shape_and_action_and_every_pair_of_them_occurs_in_training():
    seen = {s.triple for scene in world.sample_scenes(6000, 0) for s in scene.shapes}
    assert {(colour, shape) for colour, shape, _ in seen} == {(c, s) for c in world.COLOURS for s in world.SHAPES}
    assert {(shape, action) for _, shape, action in seen} == {(s, a) for s in world.SHAPES for a in world.ACTIONS}
    assert {(colour, action) for colour, _, action in seen} == {(c, a) for c in world.COLOURS for a in world.ACTIONS}


def test_unknown_split_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="held-out"):
        world.sample_scenes(1, 0, "test")


@pytest.mark.parametrize("split", world.SPLITS)
def test_paths_do_what_their_action_says_and_stay_in_the_frame(split):
    for scene in world.sample_scenes(500, 5, split):
        assert len({s.colour for s in scene.shapes}) == len({s.shape for s in scene.shapes}) == len(scene.shapes)
        for shape in scene.shapes:
            assert _observed_action(shape) == shape.action
            for time in (0.0, 1.0):
                assert all(0.1 < coordinate < 0.9 for coordinate in shape.centre(time))


def _observed_action(shape: world.MovingShape) -> str:
    """What a path does, from its positions and sizes alone."""
    (x0, y0), (x1, y1) = shape.centre(0.02), shape.centre(0.98)
    visible = {shape.visible(step / 40) for step in range(40)}
    if visible == {True, False}:
        return "blinks"
    growth = shape.radius(0.98) / shape.radius(0.02)
    if abs(math.log(growth)) > 0.5:
        return "grows" if growth > 1 else "shrinks"
    if math.hypot(x1 - x0, y1 - y0) < 0.01:
        return "stays still"
    if abs(x1 - x0) > abs(y1 - y0):
        return "moves right" if x1 > x0 else "moves left"
    return "moves down" if y1 > y0 else "moves up"
