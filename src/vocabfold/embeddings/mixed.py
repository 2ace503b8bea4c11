"""Rows in 8 or in 4 bits: a text is mostly made of few tokens, and those of a byte pair encoding come first."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabfold.embeddings.base import TokenEmbedding, table_shape
from vocabfold.embeddings.quantized import QuantizedEmbedding
from vocabfold.errors import UserError

GROUP_SIZE = 64
FREQUENT_SHARE = 1 / 12  # of the rows, in 8 bits: with groups of 64 columns the whole takes a seventh of float32


class MixedEmbedding(TokenEmbedding):
    """The rows of the tokens 0 .. ``frequent_rows`` - 1 in 8 bits with a scale a row, the others in 4 with a scale for
    ``group_size`` columns (None: the whole row).

    Raises UserError unless both parts have rows, and as QuantizedEmbedding.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, frequent_rows: int, group_size: int | None = None
    ) -> None:
        super().__init__()
        if not 1 <= frequent_rows < num_embeddings:
            raise UserError(
                f"embedding.frequent_rows is {frequent_rows}: choose between 1 and {num_embeddings - 1}, or "
                "embedding=int8 or int4 for all rows"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.frequent_rows = frequent_rows
        self.frequent = QuantizedEmbedding(frequent_rows, embedding_dim, 8)
        self.others = QuantizedEmbedding(num_embeddings - frequent_rows, embedding_dim, 4, group_size)

    @property
    def group_size(self) -> int:
        """Columns with a scale of their own, in the rows of 4 bits."""
        return self.others.group_size

    def draw(self, std: float) -> None:
        """See TokenEmbedding."""
        self.frequent.draw(std)
        self.others.draw(std)

    def look_up(self, ids: Tensor) -> Tensor:
        """See TokenEmbedding."""
        flat = ids.flatten()
        is_frequent = flat < self.frequent_rows
        order = torch.cat([is_frequent.nonzero().squeeze(-1), (~is_frequent).nonzero().squeeze(-1)])
        count = int(is_frequent.sum())
        rows = [
            self.frequent.look_up(flat[order[:count]]),
            self.others.look_up(flat[order[count:]] - self.frequent_rows),
        ]
        return torch.cat(rows)[order.argsort()].view(*ids.shape, self.embedding_dim)

    def prepare_for_inference(self) -> None:
        """See QuantizedEmbedding."""
        self.frequent.prepare_for_inference()
        self.others.prepare_for_inference()

    def stored(self) -> list[Tensor]:
        """See TokenEmbedding."""
        return [*self.frequent.stored(), *self.others.stored()]

    @property
    def num_parameters(self) -> int:
        """See TokenEmbedding."""
        return self.frequent.num_parameters + self.others.num_parameters

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, frequent_rows: int, group_size: int | None = None) -> MixedEmbedding:
        """``weight`` [V, D], to be trained further or prepared for inference."""
        embedding = cls(*table_shape(weight), frequent_rows, group_size)
        for part, rows in ((embedding.frequent, weight[:frequent_rows]), (embedding.others, weight[frequent_rows:])):
            assert part.weight is not None
            part.weight.copy_(rows)
        return embedding
