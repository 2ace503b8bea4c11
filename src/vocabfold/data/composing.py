"""Pictures put together on the training device, to the last pixel those of drawing.picture.

Pillow draws each mask once: of 184,320 classes there are 1,920 geometries. What is left for each picture is its place,
letter and noise, which workers choose, and the blending of colours, which a device does for a whole batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vocabfold.data.drawing import (
    LETTERS,
    Classes,
    Geometry,
    chance,
    fill_colours,
    geometry_of,
    letter_mask,
    masks,
    noise_of,
    outline_grey,
)

GROUND = 255


class Chances(NamedTuple):
    """What varies within a class, of B pictures: ``labels`` [B], ``shifts`` [B, 2] right and down in pixels,
    ``letters`` [B], and for the K pictures whose texture is noise their rows ``noisy`` [K] and their ``noise``
    [K, side, side] uint8."""

    labels: np.ndarray
    shifts: np.ndarray
    letters: np.ndarray
    noisy: np.ndarray
    noise: np.ndarray


def chances(classes: Classes, seed: int, numbers: np.ndarray, side: int) -> Chances:
    """Of the pictures with these ``numbers`` in the sequence that ``seed`` starts."""
    shifts, letters, noisy, noise = [], [], [], []
    for row, number in enumerate(numbers.tolist()):
        shift, letter, random = chance(seed, number, side)
        shifts.append(shift)
        letters.append(letter)
        if classes.attributes(number % len(classes))["texture"] == "noise":
            noisy.append(row)
            noise.append(noise_of(random, side))
    stacked = np.stack(noise) if noise else np.empty((0, side, side), np.uint8)
    places, named, rows = (np.array(part, np.int64) for part in (shifts, letters, noisy))
    return Chances(numbers % len(classes), places, named, rows, stacked)


@dataclass(frozen=True)
class Undrawn:
    """A batch of pictures that ``to`` draws."""

    classes: Classes
    side: int
    chances: Chances

    def to(self, device: torch.device) -> Tensor:
        """[B, 3, side, side] uint8 on ``device``, channels last in memory."""
        labels, shifts, letters, noisy, noise = (torch.from_numpy(part).to(device) for part in self.chances)
        parts = _parts(self.classes, self.side, device)
        palette = parts.palettes[parts.palette_of[labels]]  # [B, 121, 3]
        flat = palette[:, palette.shape[1] // 2, None, None]  # [B, 1, 1, 3]
        colours = flat.expand(-1, self.side, self.side, -1).clone()
        if len(noisy):
            colours[noisy] = palette[noisy[:, None, None], noise.long()]
        geometry = parts.geometry_of[labels]
        picture = _blend(parts.fills[geometry], torch.full_like(colours, GROUND), colours)
        picture = _blend(parts.outlines[geometry], picture, parts.greys[labels][:, None, None, None])
        picture = _blend(parts.letters[letters], picture, torch.zeros_like(picture[:, :1, :1]))
        return _shifted(picture, shifts).to(torch.uint8).permute(0, 3, 1, 2)


class _Parts(NamedTuple):
    """All that pictures are made of, on a device; of V classes, G geometries and P palettes."""

    geometry_of: Tensor  # [V]
    palette_of: Tensor  # [V]
    greys: Tensor  # [V] int32, of the outline
    fills: Tensor  # [G, side, side] uint8
    outlines: Tensor  # [G, side, side] uint8
    palettes: Tensor  # [P, 121, 3] int32
    letters: Tensor  # [26, side, side] uint8, centred


@functools.lru_cache(maxsize=4)
def _parts(classes: Classes, side: int, device: torch.device) -> _Parts:
    geometries: dict[Geometry, int] = {}
    palettes: dict[tuple[str, float], int] = {}
    geometry_numbers, palette_numbers, greys = [], [], []
    for label in range(len(classes)):
        figure = classes.attributes(label)
        colour = str(figure["colour"]), float(figure["opacity"])
        geometry_numbers.append(geometries.setdefault(geometry_of(figure), len(geometries)))
        palette_numbers.append(palettes.setdefault(colour, len(palettes)))
        greys.append(outline_grey(colour[1]))
    drawn = [[np.asarray(mask) for mask in masks(geometry, side)] for geometry in geometries]
    letters = np.zeros((len(LETTERS), side, side), np.uint8)
    for number, letter in enumerate(LETTERS):
        mask = np.asarray(letter_mask(letter, side))
        top, left = ((side - extent) // 2 for extent in mask.shape)
        letters[number, top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    parts = _Parts(
        torch.tensor(geometry_numbers),
        torch.tensor(palette_numbers),
        torch.tensor(greys, dtype=torch.int32),
        torch.from_numpy(np.stack([fill for fill, _ in drawn])),
        torch.from_numpy(np.stack([outline for _, outline in drawn])),
        torch.from_numpy(np.stack([fill_colours(*colour) for colour in palettes])).int(),
        torch.from_numpy(letters),
    )
    return _Parts(*(part.to(device) for part in parts))


def _blend(mask: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Pillow's Image.paste of ``above`` on ``below``, [B, side, side, 3] int32, through ``mask`` [B, side, side]."""
    share = mask.int().unsqueeze(-1)
    rounded = below * (255 - share) + above * share + 128
    return (rounded + (rounded >> 8)) >> 8  # Pillow's division by 255


def _shifted(pictures: Tensor, shifts: Tensor) -> Tensor:
    """``pictures`` [B, side, side, 3], each moved right and down by its ``shifts`` [B, 2] over the ground."""
    side = pictures.shape[1]
    along = torch.arange(side, device=pictures.device)
    column, row = (along - shifts[:, axis, None] for axis in (0, 1))  # [B, side], of where a pixel comes from
    inside = ((row >= 0) & (row < side))[:, :, None] & ((column >= 0) & (column < side))[:, None, :]
    batch = torch.arange(len(pictures), device=pictures.device)[:, None, None]
    moved = pictures[batch, row.clamp(0, side - 1)[:, :, None], column.clamp(0, side - 1)[:, None, :]]
    return moved.where(inside.unsqueeze(-1), GROUND)
