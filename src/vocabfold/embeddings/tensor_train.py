"""TensorGPT (arXiv 2307.00526): each token's vector alone as a tensor train; nothing is shared between tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabfold.embeddings.base import TokenEmbedding, table_shape
from vocabfold.embeddings.tt_svd import check_mode_sizes, check_ranks, contract, numbers_of, tt_svd


class TensorTrainEmbedding(TokenEmbedding):
    """Row v, seen as I_1 x .. x I_K, is the contraction of its K cores; a lookup contracts the rows asked for only.

    ``mode_sizes`` I multiply to D, ``ranks`` are the K - 1 between them. Raises UserError for impossible ones.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, mode_sizes: Sequence[int], ranks: Sequence[int]):
        super().__init__()
        check_mode_sizes(mode_sizes, embedding_dim)
        check_ranks(mode_sizes, ranks)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.mode_sizes, self.ranks = list(mode_sizes), list(ranks)
        # The cores of a token side by side: one gather fetches them all.
        self.cores = nn.Parameter(torch.empty(num_embeddings, numbers_of(mode_sizes, ranks)))
        self.draw(1.0)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """See TokenEmbedding. All cores have one std: an entry sums over prod(ranks) products of K of their numbers."""
        self.cores.normal_(std=(std / math.sqrt(math.prod(self.ranks))) ** (1 / len(self.mode_sizes)))

    def look_up(self, ids: Tensor) -> Tensor:
        """See TokenEmbedding."""
        cores = F.embedding(ids.flatten(), self.cores)
        return contract(cores, self.mode_sizes, self.ranks).view(*ids.shape, self.embedding_dim)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, mode_sizes: Sequence[int], ranks: Sequence[int]) -> TensorTrainEmbedding:
        """The TT-SVD of each row of ``weight`` [V, D]."""
        embedding = cls(*table_shape(weight), mode_sizes, ranks)
        embedding.cores.copy_(tt_svd(weight, mode_sizes, ranks))
        return embedding
