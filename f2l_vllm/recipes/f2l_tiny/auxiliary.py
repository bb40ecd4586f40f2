"""Auxiliary targets that are known for a drawn scene: what each patch shows, and how it moves.

They stand in for a pretrained vision tower: a model trained from nothing on answers alone stays at chance for a long
time, and never learns directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from f2l_vllm.recipes.f2l_tiny.checkpoint import IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR
from f2l_vllm.synthetic.render import motion
from f2l_vllm.synthetic.world import COLOURS, SHAPES, Scene

_SIDE = IMAGE_SIZE // PATCH_SIZE
_COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}
_SHAPE_INDEX = {name: index for index, name in enumerate(SHAPES)}


@dataclass(frozen=True, slots=True)
class PatchTargets:
    """For B scenes, T frames, P patches in reading order, V visual tokens of 2 x 2 patches."""

    colour: Tensor  # [B, T, P] index into COLOURS; len(COLOURS) where there is only background
    shape: Tensor  # [B, T, P] index into SHAPES; len(SHAPES) where there is only background
    geometry: Tensor  # [B, T, P, 3] the shape's scaled centre and radius
    velocity: Tensor  # [B, T, V, 3] the shape's scaled movement (x, y) and growth over the clip
    moving: Tensor  # [B, T, V] bool, tokens with a velocity: a shape is there, and frames before this one show it


def patch_targets(scenes: Sequence[Scene], times_BT: Tensor, size: tuple[int, int]) -> PatchTargets:
    """The targets of scenes filmed at `size` (width, height)."""
    rows, frames = times_BT.shape
    grid = (torch.arange(_SIDE) + 0.5) / _SIDE
    colour = torch.full((rows, frames, _SIDE, _SIDE), len(COLOURS))
    shape = torch.full((rows, frames, _SIDE, _SIDE), len(SHAPES))
    geometry = torch.zeros(rows, frames, _SIDE, _SIDE, 3)
    velocity = torch.zeros(rows, frames, _SIDE, _SIDE, 3)
    width, height = size
    stretch_x, stretch_y = (height / width) ** 0.5, (width / height) ** 0.5
    where = [(b, s) for b, scene in enumerate(scenes) for s in scene.shapes]
    centre_NT2, radius_NT, visible_NT = motion([s for _, s in where], times_BT[[b for b, _ in where]])
    for (row, s), centre, radius, visible in zip(where, centre_NT2, radius_NT, visible_NT, strict=True):
        near_x = (grid - centre[:, :1]).abs() < radius[:, None] * (0.7 * stretch_x) + 0.075
        near_y = (grid - centre[:, 1:]).abs() < radius[:, None] * (0.7 * stretch_y) + 0.075
        hit = near_y[:, :, None] & near_x[:, None, :] & (visible > 0)[:, None, None]
        colour[row][hit] = _COLOUR_INDEX[s.colour]
        shape[row][hit] = _SHAPE_INDEX[s.shape]
        known = torch.cat([centre * 4 - 2, radius[:, None] * 10 - 1.5], -1)
        geometry[row][hit] = known[:, None, None].expand(-1, _SIDE, _SIDE, -1)[hit]
        moved = [(end - start) * 3 for start, end in zip(s.start, s.end, strict=True)]
        velocity[row][hit] = torch.tensor([*moved, (s.radius_end - s.radius_start) * 8])
    covered = (shape < len(SHAPES)).float()[..., None]
    patches_per_token = _per_token(covered)
    mean_velocity = _per_token(velocity) / patches_per_token.clamp_min(1)
    moving = patches_per_token[..., 0] > 0
    moving[:, : min(3, frames - 1)] = False
    return PatchTargets(colour.flatten(2), shape.flatten(2), geometry.flatten(2, 3), mean_velocity, moving)


def _per_token(patches: Tensor) -> Tensor:
    """Sum [B, T, Y, X, C] over the patches of each visual token: [B, T, V, C]."""
    side = _SIDE // SCALE_FACTOR
    blocks = patches.unflatten(3, (side, SCALE_FACTOR)).unflatten(2, (side, SCALE_FACTOR))
    return blocks.sum((3, 5)).flatten(2, 3)


class PatchHead(nn.Module):
    """Reads colour, shape and geometry from the vision tower's output; used in training only."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embed = nn.Linear(hidden_size, len(COLOURS) + 1 + len(SHAPES) + 1 + 3)

    def loss(self, features: Tensor, targets: PatchTargets) -> tuple[Tensor, dict[str, float]]:
        """Args: features [B * T, P, D]. Returns the weighted loss and its parts."""
        output = self.embed(features)
        colour, shape, geometry = output.split([len(COLOURS) + 1, len(SHAPES) + 1, 3], -1)
        colour_loss = nn.functional.cross_entropy(colour.flatten(0, 1), targets.colour.flatten())
        shape_loss = nn.functional.cross_entropy(shape.flatten(0, 1), targets.shape.flatten())
        there = targets.shape.flatten(0, 1) < len(SHAPES)
        geometry_loss = (geometry - targets.geometry.flatten(0, 1))[there].square().mean()
        parts = {"colour": colour_loss.item(), "shape": shape_loss.item(), "geometry": geometry_loss.item()}
        return colour_loss + 2 * shape_loss + geometry_loss, parts


class VelocityHead(nn.Module):
    """Reads movement from a text layer's input at the visual tokens; used in training only."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embed = nn.Linear(hidden_size, 3)

    def forward(self, features: Tensor, targets: PatchTargets) -> Tensor:
        """The loss of features [B, T * V, D]."""
        moving = targets.moving.flatten(1)
        normed = nn.functional.rms_norm(features, features.shape[-1:])
        if not moving.any():
            return normed.sum() * 0
        return (self.embed(normed) - targets.velocity.flatten(1, 2))[moving].square().mean()
