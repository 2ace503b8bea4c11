"""Factorised embedding, as in ALBERT (arXiv 1909.11942): V x E times E x D."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabfold.embeddings.base import TokenEmbedding, table_shape
from vocabfold.embeddings.tt_svd import leading_vectors
from vocabfold.errors import UserError


class LowRankEmbedding(TokenEmbedding):
    """Row v = narrow[v] @ widen with ``narrow`` [V, E] and ``widen`` [E, D]. Raises UserError unless 1 <= E <= D."""

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= embedding_dim:
            raise UserError(f"embedding.rank is {rank}: choose between 1 and the hidden size {embedding_dim}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.narrow = nn.Parameter(torch.empty(num_embeddings, rank))
        self.widen = nn.Parameter(torch.empty(rank, embedding_dim))
        self.draw(1.0)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """See TokenEmbedding. ``widen`` keeps a vector's size, so ``narrow`` moves as a dense table would."""
        self.narrow.normal_(std=std)
        self.widen.normal_(std=self.widen.shape[0] ** -0.5)

    def look_up(self, ids: Tensor) -> Tensor:
        """See TokenEmbedding."""
        return F.embedding(ids, self.narrow) @ self.widen

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, rank: int) -> LowRankEmbedding:
        """The truncated SVD of ``weight`` [V, D], by the eigenvectors of its D x D Gram matrix in float64."""
        embedding = cls(*table_shape(weight), rank)
        double = weight.double()
        vectors = leading_vectors((double.mT @ double).unsqueeze(0), rank)[0]
        embedding.narrow.copy_(double @ vectors)
        embedding.widen.copy_(vectors.mT)
        return embedding
