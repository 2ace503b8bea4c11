"""The image study's data: pictures of drawing.py's classes, drawn while training goes on, the same in every run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vocabfold.data.batches import BatchPlan
from vocabfold.data.composing import Chances, Undrawn, chances
from vocabfold.data.drawing import Classes, classes_of, picture
from vocabfold.data.workers import worker_processes
from vocabfold.errors import UserError
from vocabfold.limits import usable_cores
from vocabfold.tokens import IGNORE_INDEX

SMALLEST_SIDE = 16
SAMPLE_PICTURES = 8
BATCHES_AHEAD_PER_WORKER = 4


@dataclass(frozen=True)
class Shapes:
    """Both splits of the image set: training pictures have the numbers 0 .. ``num_train`` - 1 of drawing.picture's
    sequence, validation pictures the ``num_valid`` that follow. Every class comes equally often in each.

    What a training run asks of a corpus, and as ``targets`` the labels of the training pictures, in order.
    """

    name: str
    classes: Classes
    image_size: int
    num_train: int
    num_valid: int
    seed: int
    workers: int
    on_device: bool = False
    entropy_rate_nats: None = None
    valid_bytes_per_token: None = None
    reports_accuracy: bool = True

    @property
    def vocabulary_size(self) -> int:
        return len(self.classes)

    @property
    def targets(self) -> np.ndarray:
        return np.arange(self.num_train) % len(self.classes)

    @property
    def sha256(self) -> str:
        """Of a few of its pictures, which stand for all: the settings say how many there are and of what."""
        numbers = np.linspace(0, self.num_train + self.num_valid - 1, SAMPLE_PICTURES).astype(np.int64)
        return hashlib.sha256(_draw(self.classes, self.seed, numbers, self.image_size).tobytes()).hexdigest()

    @property
    def described(self) -> dict[str, Any]:
        """The columns of a result row that name the set; its pictures are its documents."""
        return {"corpus": self.name, "corpus_sha256": self.sha256, "corpus_documents": self.num_train}

    def with_development(self, share: float) -> Shapes:
        """The same set. Raises UserError unless ``share`` is 0: pictures for choosing settings have another seed."""
        if share:
            raise UserError("development_share is for text: with data=shapes choose settings under another data.seed")
        return self

    def with_training_tokens(self, num_tokens: int | None) -> Shapes:
        """The same set. Raises UserError unless ``num_tokens`` is None: a set of pictures has a size of its own."""
        if num_tokens is not None:
            raise UserError("training_tokens is for text: with data=shapes set data.train_images_per_class")
        return self

    def batches(self, split: str, plan: BatchPlan) -> PictureBatches:
        """Shuffled endless batches of ``train``, or those of ``valid`` in order, each picture once."""
        return PictureBatches(self, plan, split == "train")


def load_shapes(data: Mapping[str, Any]) -> Shapes:
    """The image set of a resolved conf/data/shapes.yaml. Raises UserError for a setting that no set has."""
    whole = ("train_images_per_class", "valid_images_per_class", "image_size", "seed", "workers")
    for key in whole:
        if not isinstance(data[key], int) and not (key == "workers" and data[key] is None):
            raise UserError(f"data.{key} is {data[key]!r}: choose a whole number")
    for key in ("train_images_per_class", "valid_images_per_class"):
        if data[key] < 1:
            raise UserError(f"data.{key} is {data[key]}: choose at least 1")
    if data["image_size"] < SMALLEST_SIDE:
        raise UserError(f"data.image_size is {data['image_size']}: choose at least {SMALLEST_SIDE}")
    on_device = data.get("on_device", False)
    if not isinstance(on_device, bool):
        raise UserError(f"data.on_device is {on_device!r}: choose true or false")
    if data["seed"] < 0:
        raise UserError(f"data.seed is {data['seed']}: choose 0 or more")
    # By default one core is left to the training itself.
    workers = usable_cores() - 1 if data["workers"] is None else data["workers"]
    if workers < 0:
        raise UserError(f"data.workers is {workers}: choose 0 (draw in the training process) or more")
    classes = classes_of(data["attributes"] or {})
    num_train, num_valid = (len(classes) * data[f"{split}_images_per_class"] for split in ("train", "valid"))
    return Shapes(data["name"], classes, data["image_size"], num_train, num_valid, data["seed"], workers, on_device)


class PictureBatches:
    """Pictures [B, 3, side, side] uint8 (channels last in memory) and their classes [B] int64, as batches of B.

    Of R ranks rank r takes pictures r, r + R, r + 2R ... of every batch. Batch ``index`` is a pure function of the
    plan's seed and ``index``; with workers the batches after it are drawn while it is used. Of a set ``on_device``
    the pictures of a batch are Undrawn, which ``to`` draws there.
    """

    def __init__(self, shapes: Shapes, plan: BatchPlan, is_training: bool) -> None:
        self.shapes, self.plan, self.is_training = shapes, plan, is_training
        self.first = 0 if is_training else shapes.num_train
        self.count = shapes.num_train if is_training else shapes.num_valid
        self.batches_per_epoch = self.count // plan.batch_size
        self.targets_per_batch = plan.batch_size
        if is_training and self.batches_per_epoch == 0:
            raise UserError(f"{self.count} pictures are less than one batch of {plan.batch_size}: lower batch_size")
        self._ahead: dict[int, Future[np.ndarray | Chances]] = {}

    def batch(self, index: int) -> tuple[Tensor | Undrawn, Tensor]:
        """This rank's part of training batch ``index`` >= 0, which may lie in any epoch."""
        return self._drawn(index, None)

    @property
    def num_evaluation_batches(self) -> int:
        """How many ``evaluation_batches`` yields."""
        return -(-self.count // self.plan.batch_size)

    def evaluation_batches(self) -> Iterator[tuple[Tensor | Undrawn, Tensor]]:
        """All pictures in order, the smaller last batch included; over the ranks each exactly once.

        Every rank yields the same number of batches: one without a picture gets one that no loss counts.
        """
        for index in range(self.num_evaluation_batches):
            yield self._drawn(index, self.num_evaluation_batches)

    def _drawn(self, index: int, end: int | None) -> tuple[Tensor | Undrawn, Tensor]:
        """Batch ``index``; those before ``end`` (None: without end) may be drawn ahead."""
        pictures = self._by_workers(index, end) if self.shapes.workers else self._made(*self._task(index))
        numbers = self._numbers(index)
        labels = numbers % len(self.shapes.classes) if len(numbers) else np.array([IGNORE_INDEX])
        if isinstance(pictures, Chances):
            undrawn = Undrawn(self.shapes.classes, self.shapes.image_size, pictures)
            return undrawn, torch.from_numpy(labels)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.from_numpy(labels)

    @property
    def _made(self) -> Callable[..., np.ndarray | Chances]:
        """What a batch takes before it comes to the device."""
        return chances if self.shapes.on_device else _draw

    def _by_workers(self, index: int, end: int | None) -> np.ndarray | Chances:
        last = index + BATCHES_AHEAD_PER_WORKER * self.shapes.workers
        self._ahead = {number: future for number, future in self._ahead.items() if number >= index}
        try:
            for number in range(index, last if end is None else min(last, end)):
                if number not in self._ahead:
                    self._ahead[number] = _pool(self.shapes.workers).submit(self._made, *self._task(number))
            return self._ahead.pop(index).result()
        except BrokenProcessPool as error:
            _pool.cache_clear()
            raise UserError(
                "a process that draws pictures died, for lack of memory perhaps: try data.workers=0"
            ) from error

    def _task(self, index: int) -> tuple[Classes, int, np.ndarray, int]:
        numbers = self._numbers(index)
        if len(numbers) == 0:  # a rank without a picture in the last batch draws one that no loss counts
            numbers = np.array([self.first])
        return self.shapes.classes, self.shapes.seed, numbers, self.shapes.image_size

    def _numbers(self, index: int) -> np.ndarray:
        """The numbers of the pictures that this rank takes of batch ``index``."""
        if index < 0:
            raise IndexError(f"batch {index}: batches are numbered from 0")
        size, rank, ranks = self.plan.batch_size, self.plan.rank, self.plan.world_size
        if not self.is_training:
            return self.first + np.arange(index * size + rank, min((index + 1) * size, self.count), ranks)
        epoch, position = divmod(index, self.batches_per_epoch)
        return _epoch_order(self.plan.seed, epoch, self.count)[position * size + rank : (position + 1) * size : ranks]


@functools.lru_cache(maxsize=2)  # batches drawn ahead may lie in the next epoch
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@functools.cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes that outlive a run: the next run of a sweep need not wait for their start."""
    return worker_processes(workers)


def _draw(classes: Classes, seed: int, numbers: np.ndarray, side: int) -> np.ndarray:
    pictures = np.empty((len(numbers), side, side, 3), np.uint8)
    for row, number in enumerate(numbers.tolist()):
        pictures[row] = picture(classes, seed, number, side)
    return pictures
