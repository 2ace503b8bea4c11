"""Which classes of pictures no model can tell apart, and what that leaves at best."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from vocabfold.data.drawing import ATTRIBUTES, Classes, Geometry, fill_colours, geometry_of, masks, outline_grey


@dataclass(frozen=True)
class Lookalikes:
    """Classes whose pictures are the same to the last pixel when place, letter and noise are: ``alike`` [V] gives each
    class the smallest class that looks like it."""

    classes: Classes
    alike: np.ndarray

    def best_accuracy(self, group_of: Sequence[int] | np.ndarray | None = None) -> float:
        """The highest share of pictures whose class (or the group ``group_of`` [V] of it) any model can name.

        Classes come equally often. Of those that look alike it can always name the class, or the group with the most of
        them, and is right for no other.
        """
        if group_of is None:
            return len(set(self.alike.tolist())) / len(self.alike)
        counts: dict[int, Counter[int]] = defaultdict(Counter)
        for original, group in zip(self.alike.tolist(), np.asarray(group_of).tolist(), strict=True):
            counts[original][group] += 1
        return sum(max(groups.values()) for groups in counts.values()) / len(self.alike)

    def by_option(self, attribute: str) -> dict[str | int | float, float]:
        """For every option of an attribute: the share of its classes that look like no other class."""
        column = list(ATTRIBUTES).index(attribute)
        sizes = Counter(self.alike.tolist())
        alone: dict[str | int | float, list[bool]] = {option: [] for option in self.classes.options[column]}
        for label, original in enumerate(self.alike.tolist()):
            alone[self.classes.attributes(label)[attribute]].append(sizes[original] == 1)
        return {option: float(np.mean(values)) for option, values in alone.items()}


def find_lookalikes(classes: Classes, side: int) -> Lookalikes:
    """Draw every geometry's masks and mix every colour once; classes with the same of all look alike, as do no others.

    drawing.draw makes a picture of these alone, so that comparing them compares all pictures.
    """
    first: dict[tuple[object, ...], int] = {}
    alike = np.empty(len(classes), np.int64)
    for label in tqdm(range(len(classes)), desc="comparing classes", mininterval=2.0, disable=None):
        figure = classes.attributes(label)
        opacity, has_noise = float(figure["opacity"]), figure["texture"] == "noise"
        colours = fill_colours(str(figure["colour"]), opacity)
        shown = colours if has_noise else colours[len(colours) // 2]
        looks = (_mask_digest(geometry_of(figure), side), shown.tobytes(), has_noise, outline_grey(opacity))
        alike[label] = first.setdefault(looks, label)
    return Lookalikes(classes, alike)


@functools.cache
def _mask_digest(geometry: Geometry, side: int) -> bytes:
    fill, outline = masks(geometry, side)
    return hashlib.blake2b(fill.tobytes() + outline.tobytes(), digest_size=16).digest()
