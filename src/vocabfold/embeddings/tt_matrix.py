"""TT-matrix embedding (Khrulkov et al., arXiv 1901.10787): the whole table as one tensor train, its cores shared by all
tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabfold.embeddings.base import TokenEmbedding, table_shape
from vocabfold.embeddings.tt_svd import factorisations, largest_ranks, tt_svd
from vocabfold.errors import OutOfReach, UserError

NUM_CORES = 3
SLICE_FLOPS = 2e6  # what a product of its own costs beside its work: 20 us at 100 GFLOP/s, forward and backward more


class TTMatrixEmbedding(TokenEmbedding):
    """Token (v_1, .., v_K) and dimension (d_1, .., d_K), both written in mixed radix, most significant digit first:
    entry = core_1[v_1, :, d_1, :] .. core_K[v_K, :, d_K, :] with cores [V_k, r_{k-1}, D_k, r_k] and equal ranks, each
    cut to what its unfolding can have. Raises UserError for a rank below 1."""

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"embedding.rank is {rank}: choose at least 1")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        shapes = matrix_core_shapes(num_embeddings, embedding_dim, rank)
        self.cores = nn.ParameterList(torch.empty(shape) for shape in shapes)
        digits = torch.unravel_index(torch.arange(num_embeddings), [shape[0] for shape in shapes])
        self.digits: Tensor
        self.register_buffer("digits", torch.stack(digits, dim=1).int(), persistent=False)
        self.draw(1.0)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """See TokenEmbedding. An entry sums over the product of the ranks products of K numbers of one std."""
        ranks = [core.shape[3] for core in self.cores]
        for core in self.cores:
            core.normal_(std=(std / math.sqrt(math.prod(ranks))) ** (1 / len(self.cores)))

    def look_up(self, ids: Tensor) -> Tensor:
        """See TokenEmbedding."""
        digits = self.digits.index_select(0, ids.flatten()).long()
        first, second, third = self.cores
        product = F.embedding(digits[:, 0], first.flatten(1))
        num_pairs = len(second) * len(third)
        token_flops = 2 * first.shape[2] * second[0].numel()
        if len(digits) < num_pairs or len(digits) * token_flops < num_pairs * SLICE_FLOPS:
            product = _times_slices(product, second, digits[:, 1])
            product = _times_slices(product, third, digits[:, 2])
        else:  # tokens share their last two digits: one product a pair of digits, not one a token
            pairs = torch.matmul(second.reshape(-1, second.shape[3]), third.squeeze(3))  # [V_3, V_2 r_1 d_2, d_3]
            pairs = pairs.view(num_pairs, second.shape[1], -1, 1)
            product = _times_slices(product, pairs, digits[:, 2] * len(second) + digits[:, 1])
        return product.reshape(*ids.shape, self.embedding_dim)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, rank: int) -> TTMatrixEmbedding:
        """The TT-SVD of ``weight`` [V, D], filled up with rows of zeros to as many as the digits can name."""
        embedding = cls(*table_shape(weight), rank)
        rows = [core.shape[0] for core in embedding.cores]
        columns = [core.shape[2] for core in embedding.cores]
        padded = weight.new_zeros(math.prod(rows), weight.shape[1])
        padded[: len(weight)] = weight
        pairs = [axis for k in range(NUM_CORES) for axis in (k, NUM_CORES + k)]
        mode_sizes = [row * column for row, column in zip(rows, columns, strict=True)]
        ranks = [core.shape[3] for core in embedding.cores][:-1]
        flat = tt_svd(padded.view(*rows, *columns).permute(pairs).reshape(1, -1), mode_sizes, ranks)[0]
        for core, part in zip(embedding.cores, flat.split([core.numel() for core in embedding.cores]), strict=True):
            count, before, size, after = core.shape
            core.copy_(part.view(before, count, size, after).transpose(0, 1))
        return embedding


def _times_slices(product: Tensor, core: Tensor, digit: Tensor) -> Tensor:
    """product [N, L r] times core[digit] [N, r, d r'] -> [N, L d r'].

    Tokens with the same digit take one product together: a slice for each token would need r d r' numbers a token.
    """
    count, before, size, after = core.shape
    order = digit.argsort()
    parts = product[order].split(digit.bincount(minlength=count).tolist())
    slices = core.flatten(2).unbind()
    products = [
        (part.reshape(-1, before) @ matrix).view(len(part), -1)
        for part, matrix in zip(parts, slices, strict=True)
        if len(part)
    ]
    if not products:
        return product.new_empty(0, product.shape[1] // before * size * after)
    return torch.cat(products)[order.argsort()]


def matrix_core_shapes(num_embeddings: int, embedding_dim: int, rank: int) -> list[tuple[int, int, int, int]]:
    """(V_k, r_{k-1}, D_k, r_k) of the three cores: modes as equal as they can be, the V_k with a product of at least
    V."""
    rows = near_root(num_embeddings)
    found = [shape for shape in factorisations(embedding_dim) if len(shape) == NUM_CORES]
    columns = min(found, key=sum) if found else (1, 1, embedding_dim)
    largest = largest_ranks([row * column for row, column in zip(rows, columns, strict=True)])
    ends = [1, *(min(rank, most) for most in largest), 1]
    return [(rows[k], ends[k], columns[k], ends[k + 1]) for k in range(NUM_CORES)]


def near_root(count: int) -> Sequence[int]:
    """NUM_CORES whole numbers, as equal as can be, with a product of at least ``count`` and little more."""
    numbers = []
    for left in range(NUM_CORES, 0, -1):
        number = max(1, math.ceil(round(count ** (1 / left), 9)))
        numbers.append(number)
        count = -(-count // number)
    return numbers


def rank_under(num_embeddings: int, embedding_dim: int, most_numbers: float) -> int:
    """The largest rank that costs at most ``most_numbers`` in all. Raises UserError where rank 1 costs more."""

    def cost(rank: int) -> int:
        return sum(math.prod(shape) for shape in matrix_core_shapes(num_embeddings, embedding_dim, rank))

    if cost(1) > most_numbers:
        dense = num_embeddings * embedding_dim
        raise OutOfReach(
            f"compression {dense / most_numbers:.4g} is out of reach of a TT matrix of {num_embeddings} x "
            f"{embedding_dim}: choose at most {dense / cost(1):.0f}"
        )
    rank = 1
    while cost(rank + 1) <= most_numbers and cost(rank + 1) > cost(rank):
        rank += 1
    return rank
