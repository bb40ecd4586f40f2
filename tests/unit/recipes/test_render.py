"""What training draws is what decoding and processing a real mp4 file gives."""

import av
import numpy as np
import pytest
import torch

from f2l_vllm.hypernetwork.config import INSTRUCTION
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.recipes.f2l_tiny.checkpoint import build_model, build_processor
from f2l_vllm.recipes.f2l_tiny.filming import pixel_values
from f2l_vllm.recipes.f2l_tiny.prompts import Clip, Prompts
from f2l_vllm.synthetic.render import FRAME_SIZES, coverage, draw, write_mp4
from f2l_vllm.synthetic.world import MovingShape, Scene, sample_scenes
from f2l_vllm.video.sample import sample_video


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.mark.parametrize("size", [*FRAME_SIZES, (1280, 720)])
@pytest.mark.parametrize(("fps", "seconds"), [(10, 4.0), (24, 2.5)])
def test_a_file_gives_nearly_the_pixels_and_exactly_the_tokens_of_training(processor, tmp_path, size, fps, seconds):
    scene = sample_scenes(1, seed=size[0] + fps, split="held-out")[0]
    path = write_mp4(scene, tmp_path / "scene.mp4", size, fps, seconds)
    sampled = sample_video(path, processor)
    inputs = VideoEncoder(build_model(processor), processor).prepare(sampled)

    indices = tuple(int(index) for index in sampled.metadata.frames_indices)
    clip = Clip(float(fps), round(seconds * fps), indices)
    drawn = pixel_values([scene], torch.tensor([clip.times]), size, processor.video_processor)

    assert inputs["input_ids"][0].tolist() == Prompts(processor).internalization(clip, INSTRUCTION)
    assert len(indices) == 8
    difference = (inputs["pixel_values"] - drawn).abs()
    assert difference.mean() < 0.02  # of a range of 2; yuv colours alone cost about one level of 255
    assert difference.quantile(0.99) < 0.08


def test_a_file_has_as_many_frames_and_seconds_as_asked_for(tmp_path):
    path = write_mp4(sample_scenes(1, 0)[0], tmp_path / "scene.mp4", (64, 48), fps=12.5, seconds=2.0)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert (float(container.streams.video[0].average_rate), container.duration) == (12.5, 2 * av.time_base)
    assert np.stack(frames).shape == (25, 48, 64, 3)


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even"):
        write_mp4(sample_scenes(1, 0)[0], tmp_path / "scene.mp4", (321, 240))


def _shape(**changes):
    known = {"start": (0.5, 0.5), "end": (0.5, 0.5), "radius_start": 0.15, "radius_end": 0.15}
    return MovingShape(**{"colour": "red", "shape": "circle", "action": "stays still", **known, **changes})


def test_a_shape_has_its_colour_at_its_centre_and_the_background_elsewhere():
    image = draw(Scene((_shape(),), "navy"), torch.tensor([0.5]), 60, 80)[0]
    assert tuple(image[30, 40]) == (215, 40, 40)
    assert tuple(image[0, 0]) == (20, 30, 90)


@pytest.mark.parametrize("shape", ["circle", "cross", "square", "triangle"])
@pytest.mark.parametrize(("width", "height"), [(80, 80), (160, 40)])
def test_shapes_of_one_radius_cover_about_the_same_area_at_any_aspect_ratio(shape, width, height):
    scene = Scene((_shape(shape=shape, radius_start=0.1, radius_end=0.1),), "black")
    area = coverage([scene], torch.tensor([[0.0]]), height, width).mean().item() * 2
    assert 0.4 < area / (3.1416 * 0.1**2) < 1.2


def test_the_second_shape_hides_the_first_and_blinking_hides_a_shape():
    scene = Scene((_shape(), _shape(colour="blue", shape="square", action="blinks")), "black")
    on, off = coverage([scene], torch.tensor([[0.1, 0.3]]), 40, 40)[0, :, :, 20, 20].unbind(-1)
    assert on.tolist() == [0, 1]
    assert off.tolist() == [1, 0]
