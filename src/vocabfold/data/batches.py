"""Batches of token ids as a pure function of a seed and a number, so that a run resumes exactly from its step alone.

Where tokens lie coded, a thread decodes a stretch of batches at once while the stretch before it is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vocabfold.data.token_file import TokenFile
from vocabfold.errors import UserError
from vocabfold.tokens import IGNORE_INDEX

STRETCH_BATCHES = 32  # decoded together: many segments side by side take hardly longer than one
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BatchPlan:
    """How a training run wants its data served; ``batch_size`` counts the rows of all ``world_size`` processes.

    Raises UserError for sizes that cannot be served.
    """

    sequence_length: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise UserError(f"the sequence length must be 1 or more, not {self.sequence_length}")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise UserError(
                f"the batch size {self.batch_size} must be a multiple of the number of processes, {self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank} is not one of {self.world_size} processes")
        if self.seed < 0:
            raise UserError(f"the seed must be 0 or more, not {self.seed}")


class Batches:
    """Inputs and next-token targets from a token file; ``batch_size`` B counts the rows of all ranks, T =
    ``sequence_length``.

    layout ``packed``: rows are windows of T + 1 tokens at stride T across documents, so that an epoch predicts each
    token but the first once; training leaves out the last, shorter window. layout ``padded``: a document a row, cut
    at T + 1 tokens; inputs are padded with the end token, targets with IGNORE_INDEX, the end token after a document
    is predicted once. Rank r of R takes rows r, r + R, r + 2R ... of every batch. With ``shuffle`` each epoch has its
    own order, drawn from (seed, epoch).

    Raises UserError for sizes that cannot be served; with ``shuffle`` (training) also for a file of less than one
    batch.
    """

    def __init__(
        self,
        tokens: TokenFile,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        layout: str = "packed",
        end_token: int | None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if layout not in ("packed", "padded"):
            raise UserError(f"data.layout must be packed or padded, not {layout}")
        if layout == "padded" and end_token is None:
            raise UserError(
                "data.layout=padded needs documents and an end token, which this corpus lacks; use data.layout=packed"
            )
        BatchPlan(sequence_length, batch_size, seed, rank, world_size)  # its checks
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self._tokens = tokens.tokens
        self._padding = 0 if end_token is None else end_token
        self._starts, self._lengths = _rows(tokens, layout, sequence_length)
        # the windows that training takes: in the packed layout the last one may be shorter, which would waste its row
        self._num_training_rows = len(self._starts)
        if layout == "packed" and len(self._starts) and self._lengths[-1] <= sequence_length:
            self._num_training_rows -= 1
        self._order = (-1, np.empty(0, np.int64))
        # memory maps need no thread: a batch is there in microseconds
        self._thread = None if isinstance(self._tokens, np.ndarray) else ThreadPoolExecutor(1, "decoding")
        self._stretches: dict[int, Future[list[Batch]]] = {}
        if len(self._starts) == 0:
            raise UserError("the corpus has no token to predict; give it more text")
        self.batches_per_epoch = self._num_training_rows // batch_size
        self.targets_per_batch = batch_size * sequence_length
        if shuffle:
            self._require_a_batch()

    def batch(self, index: int) -> Batch:
        """Inputs and targets, each [B / world_size, T] int64, of batch ``index`` >= 0, which may lie in any epoch.

        Targets hold IGNORE_INDEX where there is nothing to predict. Raises UserError if the file has less than one
        batch.
        """
        self._require_a_batch()
        if index < 0:
            raise IndexError(f"batch {index}: batches are numbered from 0")
        if self._thread is None:
            return self._gather(self._batch_rows(index))
        stretch, place = divmod(index, STRETCH_BATCHES)
        wanted = (stretch, stretch + 1)
        self._stretches = {
            number: self._stretches.get(number) or self._thread.submit(self._stretch, number) for number in wanted
        }
        return self._stretches[stretch].result()[place]

    @property
    def num_evaluation_batches(self) -> int:
        """How many ``evaluation_batches`` yields."""
        return -(-len(self._starts) // self.batch_size)

    def evaluation_batches(self) -> Iterator[Batch]:
        """All rows in order, the shorter last window and the smaller last batch included; over the ranks each exactly
        once.

        Every rank yields the same number of batches, so that collective calls stay in step: where the last batch has
        no row for a rank it gets one row whose targets are all IGNORE_INDEX.
        """
        starts = np.arange(0, len(self._starts), self.batch_size)
        at_once = 1 if self._thread is None else STRETCH_BATCHES
        for stretch in np.split(starts, np.arange(at_once, len(starts), at_once)):
            rows = [self._evaluation_rows(start) for start in stretch]
            # a rank without a row of its own takes the first one, and counts none of its targets
            batches = self._gather_each(
                [own if len(own) else np.array([start]) for own, start in zip(rows, stretch, strict=True)]
            )
            for own, (inputs, targets) in zip(rows, batches, strict=True):
                yield inputs, targets if len(own) else torch.full_like(targets, IGNORE_INDEX)

    def target_positions(self) -> np.ndarray:
        """Where in the token file each target lies that ``evaluation_batches`` counts, in its order, int64: of all
        ranks together."""
        counts = self._lengths - 1
        first = np.repeat(self._starts + 1 - (counts.cumsum() - counts), counts)
        return first + np.arange(counts.sum())

    def _evaluation_rows(self, start: int) -> np.ndarray:
        return np.arange(start + self.rank, min(start + self.batch_size, len(self._starts)), self.world_size)

    def _batch_rows(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, self.batches_per_epoch)
        first = position * self.batch_size + self.rank
        last = (position + 1) * self.batch_size
        return self._epoch_order(epoch)[first : last : self.world_size]

    def _stretch(self, number: int) -> list[Batch]:
        """The batches number x STRETCH_BATCHES and following. Runs in the one thread, which alone asks for orders."""
        first = number * STRETCH_BATCHES
        return self._gather_each([self._batch_rows(index) for index in range(first, first + STRETCH_BATCHES)])

    def _require_a_batch(self) -> None:
        if self.batches_per_epoch == 0:
            raise UserError(
                f"the corpus gives {self._num_training_rows} sequences of {self.sequence_length} tokens, less than one "
                f"batch of {self.batch_size}; give it more text or lower the batch size or the sequence length"
            )

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self._num_training_rows)
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._order = (epoch, generator.permutation(self._num_training_rows))
        return self._order[1]

    def _gather_each(self, rows: list[np.ndarray]) -> list[Batch]:
        """One batch for each of several sets of rows."""
        inputs, targets = self._gather(np.concatenate(rows))
        sizes = [len(part) for part in rows]
        return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))

    def _gather(self, rows: np.ndarray) -> Batch:
        offset = np.arange(self.sequence_length + 1)
        position = self._starts[rows, None] + offset
        present = offset < self._lengths[rows, None]
        window = self._tokens[np.minimum(position, len(self._tokens) - 1)].astype(np.int64)
        inputs = np.where(present, window, self._padding)[:, :-1]
        targets = np.where(present, window, IGNORE_INDEX)[:, 1:]
        return torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(np.ascontiguousarray(targets))


def _rows(tokens: TokenFile, layout: str, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First position and length in tokens (2 .. T + 1) of every row that predicts anything; both int64 [rows]."""
    if layout == "packed":
        starts = np.arange(0, len(tokens) - 1, sequence_length)
        return starts, np.minimum(len(tokens) - starts, sequence_length + 1)
    boundaries = np.asarray(tokens.document_starts).astype(np.int64)
    lengths = np.minimum(np.diff(boundaries), sequence_length + 1)
    return boundaries[:-1][lengths > 1], lengths[lengths > 1]
