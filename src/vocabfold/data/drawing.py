"""Pictures of one figure each, in the eight attributes of arXiv 2411.06371's image study, drawn with Pillow.

The paper names the attributes and their options and leaves the drawing open. Here: a white ground; the figure, its
pattern and its outline turn together; texture is grey noise within the figure; opacity blends the colours of fill and
outline with white; a black letter, upright, labels the centre. Within a class the place, the letter and the noise vary
from picture to picture. No torch in this module: worker processes import it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont

from vocabfold.errors import UserError

Options = tuple[str | int | float, ...]
# In the order of the published table; the last one turns fastest in the numbering of classes: 184,320 of them.
ATTRIBUTES: dict[str, Options] = {
    "shape": ("circle", "square", "triangle", "pentagon", "hexagon", "octagon", "star", "cross"),
    "pattern": ("solid", "striped", "dotted", "checkered"),
    "rotation_degrees": (0, 60, 120, 180, 240, 300),
    "colour": (
        "red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "cyan", "magenta", "lime", "teal",
    ),
    "size": ("tiny", "small", "medium", "large", "huge"),
    "texture": ("none", "noise"),
    "opacity": (0.25, 0.5, 0.75, 1.0),
    "border": ("solid", "dashed"),
}  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CORNERS = {"square": 4, "triangle": 3, "pentagon": 5, "hexagon": 6, "octagon": 8}
# As shares of the picture's side.
RADIUS = {"tiny": 0.12, "small": 0.18, "medium": 0.24, "large": 0.30, "huge": 0.36}
LARGEST_SHIFT, LETTER_HEIGHT, PATTERN_PERIOD, LINE_WIDTH, DASH_LENGTH = 0.06, 0.14, 0.12, 0.02, 0.04
NOISE_LEVELS = 60  # the noise is uniform between minus and plus so many grey levels
OVERSAMPLING = 4  # masks are drawn this many times as large and averaged


@dataclass(frozen=True)
class Geometry:
    """What decides the outline of a figure: all but its colours."""

    shape: str
    pattern: str
    rotation_degrees: int
    size: str
    border: str


@dataclass(frozen=True)
class Classes:
    """The classes that are drawn: all combinations of ``options``, numbered with the last attribute turning fastest."""

    options: tuple[Options, ...]

    def __len__(self) -> int:
        return math.prod(map(len, self.options))

    def attributes(self, label: int) -> dict[str, str | int | float]:
        """The attributes of class ``label``, from 0."""
        found: dict[str, str | int | float] = {}
        for name, options in reversed(list(zip(ATTRIBUTES, self.options, strict=True))):
            label, index = divmod(label, len(options))
            found[name] = options[index]
        return {name: found[name] for name in ATTRIBUTES}


def classes_of(chosen: Mapping[str, Sequence[str | int | float]]) -> Classes:
    """The classes with the ``chosen`` options of some attributes and all options of the others.

    Raises UserError for an attribute or an option that does not exist, is named twice, or for none at all.
    """
    if unknown := [name for name in chosen if name not in ATTRIBUTES]:
        raise UserError(f"unknown data.attributes.{unknown[0]}: choose among {', '.join(ATTRIBUTES)}")
    for name, options in chosen.items():
        known = ATTRIBUTES[name]
        if not options or len(set(options)) < len(options) or not set(options) <= set(known):
            raise UserError(f"data.attributes.{name} is {list(options)}: choose among {', '.join(map(str, known))}")
    return Classes(tuple(tuple(chosen.get(name, options)) for name, options in ATTRIBUTES.items()))


def picture(classes: Classes, seed: int, index: int, side: int) -> np.ndarray:
    """Picture ``index`` >= 0 of the endless sequence that ``seed`` starts: [side, side, 3] uint8.

    Its class is ``index % len(classes)``; seed and index decide everything, whatever was drawn before.
    """
    shift, letter, random = chance(seed, index, side)
    return draw(classes.attributes(index % len(classes)), side, shift, LETTERS[letter], random)


def chance(seed: int, index: int, side: int) -> tuple[tuple[int, int], int, np.random.Generator]:
    """What varies within a class, of picture ``index``: (right, down) in pixels, the letter's number, and the generator
    that the noise is drawn from next."""
    random = np.random.Generator(np.random.PCG64([seed, index]))
    reach = int(LARGEST_SHIFT * side)
    shift = random.integers(-reach, reach + 1, size=2)
    letter = int(random.integers(len(LETTERS)))
    return (int(shift[0]), int(shift[1])), letter, random


def noise_of(random: np.random.Generator, side: int) -> np.ndarray:
    """[side, side] uint8: which of ``fill_colours`` each pixel of a noisy fill has."""
    return random.integers(2 * NOISE_LEVELS + 1, size=(side, side), dtype=np.uint8)


def draw(
    attributes: Mapping[str, str | int | float],
    side: int,
    shift: tuple[int, int],
    letter: str,
    random: np.random.Generator,
) -> np.ndarray:
    """One figure ``shift`` = (right, down) pixels from the centre: [side, side, 3] uint8. ``random`` is the noise."""
    opacity = float(attributes["opacity"])
    fill, outline = masks(geometry_of(attributes), side)
    colours = fill_colours(str(attributes["colour"]), opacity)
    image = Image.new("RGB", (side, side), "white")
    if attributes["texture"] == "noise":
        image.paste(Image.fromarray(colours[noise_of(random, side)]), shift, fill)
    else:
        image.paste(tuple(colours[len(colours) // 2].tolist()), shift, fill)
    image.paste((outline_grey(opacity),) * 3, shift, outline)
    label = letter_mask(letter, side)
    corner = [(side - extent) // 2 + moved for extent, moved in zip(label.size, shift, strict=True)]
    image.paste("black", (corner[0], corner[1]), label)
    return np.asarray(image)


def geometry_of(attributes: Mapping[str, str | int | float]) -> Geometry:
    """The geometry of a class."""
    return Geometry(
        str(attributes["shape"]),
        str(attributes["pattern"]),
        int(attributes["rotation_degrees"]),
        str(attributes["size"]),
        str(attributes["border"]),
    )


@functools.cache  # 1,920 geometries of 2 masks: 38 MB at 100 pixels
def masks(geometry: Geometry, side: int) -> tuple[Image.Image, Image.Image]:
    """(fill with its pattern, outline) of a centred figure, each [side, side] from 0 to 255."""
    large = side * OVERSAMPLING
    fill, outline = Image.new("L", (large, large)), Image.new("L", (large, large))
    fill_pen, outline_pen = ImageDraw.Draw(fill), ImageDraw.Draw(outline)
    radius, width = RADIUS[geometry.size] * large, max(1, round(LINE_WIDTH * large))
    if geometry.shape == "circle":
        box = (large / 2 - radius, large / 2 - radius, large / 2 + radius, large / 2 + radius)
        fill_pen.ellipse(box, fill=255)
        for start, stop in _arcs(geometry, radius, large):
            outline_pen.arc(box, start, stop, fill=255, width=width)
    else:
        corners = _corners(geometry, radius, large / 2)
        fill_pen.polygon(corners, fill=255)
        for stroke in _strokes(corners, geometry.border, large):
            outline_pen.line(stroke, fill=255, width=width)
    fill = ImageChops.multiply(fill, _pattern(geometry.pattern, geometry.rotation_degrees, large))
    return fill.reduce(OVERSAMPLING), outline.reduce(OVERSAMPLING)


def _corners(geometry: Geometry, radius: float, centre: float) -> list[tuple[float, float]]:
    if geometry.shape == "star":
        polar = [(36.0 * corner, radius if corner % 2 == 0 else 0.45 * radius) for corner in range(10)]
    elif geometry.shape == "cross":  # arms a third of the span wide
        half = math.degrees(math.atan2(1, 3))
        around = [(90.0 * arm, kind) for arm in range(4) for kind in ("left", "right", "inner")]
        turn = {"left": -half, "right": half, "inner": 45.0}
        reach = {"left": radius, "right": radius, "inner": radius * math.sqrt(2 / 10)}
        polar = [(angle + turn[kind], reach[kind]) for angle, kind in around]
    else:
        count = CORNERS[geometry.shape]
        polar = [(360 * corner / count, radius) for corner in range(count)]
    turned = [(math.radians(angle + geometry.rotation_degrees), reach) for angle, reach in polar]
    # Rounded, so that corners which a symmetry moves onto each other are drawn alike.
    return [(round(centre + r * math.sin(angle), 3), round(centre - r * math.cos(angle), 3)) for angle, r in turned]


def _strokes(
    corners: list[tuple[float, float]], border: str, large: int
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The outline as lines. Dashes lie evenly on each edge, so that the outline keeps the symmetries of the figure."""
    strokes = []
    for (x, y), (next_x, next_y) in zip(corners, corners[1:] + corners[:1], strict=True):
        dashes = max(1, round(math.dist((x, y), (next_x, next_y)) / (2 * DASH_LENGTH * large)))
        ends = (
            [(0.0, 1.0)] if border == "solid" else [((d + 0.25) / dashes, (d + 0.75) / dashes) for d in range(dashes)]
        )
        for start, stop in ends:
            begin = (round(x + start * (next_x - x), 3), round(y + start * (next_y - y), 3))
            strokes.append((begin, (round(x + stop * (next_x - x), 3), round(y + stop * (next_y - y), 3))))
    return strokes


def _arcs(geometry: Geometry, radius: float, large: int) -> list[tuple[float, float]]:
    if geometry.border == "solid":
        return [(0, 360)]
    # A multiple of 12 dashes: every rotation and reflection on offer moves dashes onto dashes.
    dashes = 12 * max(1, round(2 * math.pi * radius / (2 * DASH_LENGTH * large) / 12))
    return [(360 * (dash - 0.25) / dashes, 360 * (dash + 0.25) / dashes) for dash in range(dashes)]


@functools.cache
def _pattern(pattern: str, rotation_degrees: int, large: int) -> Image.Image:
    """Where the fill has colour, [large, large] 0 or 255, turned around the centre."""
    if pattern == "solid":
        return Image.new("L", (large, large), 255)
    angle = math.radians(rotation_degrees)
    along = np.arange(large) + 0.5 - large / 2
    x, y = along[None, :], along[:, None]
    # In periods, in the figure's own frame; rounded, so that symmetries hold to the pixel.
    u = np.round((x * math.cos(angle) + y * math.sin(angle)) / (PATTERN_PERIOD * large), 6)
    v = np.round((y * math.cos(angle) - x * math.sin(angle)) / (PATTERN_PERIOD * large), 6)
    in_u, in_v = np.abs(u - np.round(u)), np.abs(v - np.round(v))  # distance to the lattice, at most a half
    if pattern == "striped":
        coloured = in_u <= 0.25
    elif pattern == "dotted":
        coloured = in_u**2 + in_v**2 <= 0.3**2
    else:
        coloured = (in_u <= 0.25) == (in_v <= 0.25)
    return Image.fromarray(coloured.astype(np.uint8) * 255)


@functools.cache
def letter_mask(letter: str, side: int) -> Image.Image:
    """The letter alone, from 0 to 255, as large as it is."""
    font = ImageFont.load_default(LETTER_HEIGHT * side)
    left, top, right, bottom = font.getbbox(letter)
    mask = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), letter, fill=255, font=font)
    return mask


@functools.cache
def fill_colours(colour: str, opacity: float) -> np.ndarray:
    """The colour over the white ground at each value of the noise, the flat colour in the middle: [121, 3] uint8."""
    noise = np.arange(-NOISE_LEVELS, NOISE_LEVELS + 1)
    solid = np.clip(np.array(ImageColor.getrgb(colour)) + noise[:, None], 0, 255)
    return (255 - opacity * (255 - solid)).round().astype(np.uint8)


def outline_grey(opacity: float) -> int:
    """Black over the white ground, 0 to 255."""
    return round(255 * (1 - opacity))
