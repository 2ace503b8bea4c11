"""Batches of token ids as a pure function of a seed and a number, so that a run resumes exactly from its step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vocabfold.constants import IGNORE_INDEX
from vocabfold.data.token_file import TokenFile
from vocabfold.errors import UserError


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
        if len(self._starts) == 0:
            raise UserError("the corpus has no token to predict; give it more text")
        self.batches_per_epoch = self._num_training_rows // batch_size
        self.targets_per_batch = batch_size * sequence_length
        if shuffle:
            self._require_a_batch()

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each [B / world_size, T] int64, of batch ``index`` >= 0, which may lie in any epoch.

        Targets hold IGNORE_INDEX where there is nothing to predict. Raises UserError if the file has less than one
        batch.
        """
        self._require_a_batch()
        if index < 0:
            raise IndexError(f"batch {index}: batches are numbered from 0")
        epoch, position = divmod(index, self.batches_per_epoch)
        first = position * self.batch_size + self.rank
        last = (position + 1) * self.batch_size
        return self._gather(self._epoch_order(epoch)[first : last : self.world_size])

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in order, the shorter last window and the smaller last batch included; over the ranks each exactly
        once.

        Every rank yields the same number of batches, so that collective calls stay in step: where the last batch has
        no row for a rank it gets one row whose targets are all IGNORE_INDEX.
        """
        for start in range(0, len(self._starts), self.batch_size):
            rows = np.arange(start + self.rank, min(start + self.batch_size, len(self._starts)), self.world_size)
            if len(rows):
                yield self._gather(rows)
            else:
                inputs, targets = self._gather(np.array([start]))
                yield inputs, torch.full_like(targets, IGNORE_INDEX)

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

    def _gather(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
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
