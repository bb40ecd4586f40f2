"""Films that grow, and what is asked about them."""

import re
from pathlib import Path

import av
import pytest

from f2l_vllm.evaluation.long_videos import ARMS, ORDER, SCENE_SECONDS, film, long_videos, markdown, moments
from f2l_vllm.evaluation.setup import Setup
from f2l_vllm.synthetic.render import write_film
from f2l_vllm.synthetic.world import BACKGROUNDS


def test_a_films_frames_show_its_scenes_one_after_the_other(tmp_path: Path) -> None:
    scenes = film(12, seed=1)
    path = write_film(scenes, tmp_path / "film.mp4", (64, 48), 1, SCENE_SECONDS)
    with av.open(str(path)) as container:
        corners = [frame.to_ndarray(format="rgb24")[1, 1] for frame in container.decode(video=0)]
    assert len(corners) == 12
    for second, corner in enumerate(corners):
        background = BACKGROUNDS[scenes[second // SCENE_SECONDS].background]
        assert abs(corner.astype(int) - background).max() < 12


def test_a_question_names_a_moment_or_an_order_and_its_truth_is_the_scenes() -> None:
    scenes = film(240, seed=2)
    asked = moments(scenes, "film", 4, seed=0)
    assert asked == moments(scenes, "film", 4, seed=0)
    assert len(asked) == len({question.id for question in asked}) == 16
    places = []
    for question in asked:
        if question.type == ORDER:
            one, other = re.fullmatch(r"Which background comes first, (\w+) or (\w+)\?", question.text).groups()
            first = next(scene.background for scene in scenes if scene.background in (one, other))
            assert question.truth == f"{first.capitalize()}."
            continue
        minute, second = map(int, re.match(r"At (\d\d):(\d\d), ", question.text).groups())
        places.append((minute * 60 + second) // SCENE_SECONDS)
        if question.type == "background":
            assert question.truth == f"{scenes[places[-1]].background.capitalize()}."
    assert [place * 4 // len(scenes) for place in places[::3]] == [0, 1, 2, 3]


def test_a_film_is_asked_in_every_way_until_it_no_longer_fits(tmp_path: Path) -> None:
    setup = Setup(max_tokens=8)
    result = long_videos([12, 600], 1, setup, tmp_path, questions=1)
    rows = {(row["frames"], row["arm"]): row for row in result["rows"]}
    assert list(rows) == [(length, way) for length in (12, 600) for way in ARMS]
    assert [rows[12, way]["n"] for way in ARMS] == [4] * 4
    assert [rows[600, way]["score"] is None for way in ARMS] == [True, False, True, False]
    assert {(one["frames"], one["arm"]) for one in result["skipped"]} == {(600, "adapter"), (600, "frames")}
    assert (rows[12, "chunks"]["chunks"], rows[600, "chunks"]["chunks"]) == (2, 15)
    assert rows[12, "frames"]["prompt_tokens"] > rows[12, "adapter"]["prompt_tokens"] + 12 * 4
    assert markdown(result).splitlines()[3].startswith("| 600 | – | ")
    with pytest.raises(ValueError, match="at least 8 frames"):
        film(7, seed=0)
