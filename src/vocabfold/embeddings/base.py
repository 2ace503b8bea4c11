"""The contract that every input embedding keeps: token ids to vectors, at a stated price in numbers and bytes."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabfold.errors import UserError


class TokenEmbedding(nn.Module, ABC):
    """V tokens (``num_embeddings``) to vectors of size D (``embedding_dim``).

    Every kind is trainable as it stands, draws itself afresh with ``draw`` and comes from a dense table by its own
    ``from_dense(weight, ...)``.
    """

    num_embeddings: int
    embedding_dim: int

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` [..] -> [.., D]. Raises UserError for an id outside 0..V-1 (on CUDA the kernel's own assertion)."""
        try:
            return self.look_up(ids)
        except IndexError as error:
            raise UserError(
                f"ids from {int(ids.min())} to {int(ids.max())} for an embedding of {self.num_embeddings} tokens: "
                f"choose ids from 0 to {self.num_embeddings - 1}"
            ) from error

    @abstractmethod
    def look_up(self, ids: Tensor) -> Tensor:
        """What ``forward`` returns. An id outside the vocabulary raises IndexError."""

    @abstractmethod
    def draw(self, std: float) -> None:
        """Fresh weights from torch's global generator, such that the entries of the rows have about this ``std``."""

    def rows(self, start: int, stop: int) -> Tensor:
        """The vectors of the tokens ``start`` .. ``stop`` - 1: [stop - start, D].

        Raises UserError unless 0 <= start <= stop <= V.
        """
        if not 0 <= start <= stop <= self.num_embeddings:
            raise UserError(f"rows {start} to {stop} do not lie within the {self.num_embeddings} of this embedding")
        device = next(itertools.chain(self.parameters(), self.buffers())).device
        return self(torch.arange(start, stop, device=device))

    def stored(self) -> list[Tensor]:
        """The tensors that are kept of a finished model."""
        return list(self.state_dict().values())

    def prepare_for_inference(self) -> None:
        """Take the form in which a finished model is kept. Only what trains in another form has something to do."""

    @property
    def num_parameters(self) -> int:
        """Numbers that are kept."""
        return sum(tensor.numel() for tensor in self.stored())

    @property
    def bytes_at_rest(self) -> int:
        """Bytes that are kept, on disk and in memory at inference."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored())

    @property
    def compression(self) -> float:
        """Bytes of a float32 table [V, D] over ``bytes_at_rest``."""
        return 4 * self.num_embeddings * self.embedding_dim / self.bytes_at_rest


class DenseEmbedding(nn.Embedding, TokenEmbedding):
    """One row of D numbers for each token: the definition of truth."""

    def look_up(self, ids: Tensor) -> Tensor:
        """See TokenEmbedding."""
        return F.embedding(ids, self.weight)

    forward = TokenEmbedding.forward  # type: ignore[assignment]

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """See TokenEmbedding."""
        self.weight.normal_(std=std)

    def rows(self, start: int, stop: int) -> Tensor:
        """See TokenEmbedding. A view: nothing is copied."""
        return self.weight[start:stop] if 0 <= start <= stop <= self.num_embeddings else super().rows(start, stop)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor) -> DenseEmbedding:
        """A copy of ``weight`` [V, D]."""
        embedding = cls(*table_shape(weight))
        embedding.weight.copy_(weight)
        return embedding


def table_shape(weight: Tensor) -> tuple[int, int]:
    """(V, D) of a table. Raises UserError where ``weight`` is none."""
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise UserError(f"an embedding table has the shape [V, D], this one is {weight.dtype} {list(weight.shape)}")
    return cast(tuple[int, int], tuple(weight.shape))


@torch.no_grad()
def relative_error(embedding: TokenEmbedding, weight: Tensor, chunk: int = 8192) -> float:
    """||rows - weight|| / ||weight|| over the whole table [V, D], in float64."""
    squared = 0.0
    for start in range(0, len(weight), chunk):
        stop = min(start + chunk, len(weight))
        squared += float((embedding.rows(start, stop).double() - weight[start:stop].double()).square().sum())
    return (squared / max(float(weight.double().square().sum()), 1e-300)) ** 0.5
