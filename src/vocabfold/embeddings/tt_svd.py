"""TT-SVD (Oseledets 2011, doi.org/10.1137/090752286) of many small tensors at once, and its possible shapes and ranks.

A tensor I_1 x .. x I_K becomes cores [r_{k-1}, I_k, r_k] with r_0 = r_K = 1, so that the entry (i_1, .., i_K) is the
product of the matrices core_k[:, i_k, :]. It costs sum r_{k-1} I_k r_k numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vocabfold.errors import OutOfReach, UserError

CHUNK = 1024  # rows at a time: their float64 copies stay in the cache
SAMPLE_ROWS = 512  # that a search compares shapes on


def check_mode_sizes(mode_sizes: Sequence[int], size: int) -> None:
    """Raise UserError unless ``mode_sizes`` are at least two numbers >= 1 that multiply to ``size``."""
    if len(mode_sizes) < 2 or min(mode_sizes) < 1 or math.prod(mode_sizes) != size:
        product = " x ".join(map(str, mode_sizes))
        raise UserError(f"mode sizes {product} do not multiply to {size}: choose two or more whole numbers that do")


def largest_ranks(mode_sizes: Sequence[int]) -> list[int]:
    """The most that rank r_k can be: the smaller side of the k-th unfolding, I_1 .. I_k against I_{k+1} .. I_K."""
    cuts = range(1, len(mode_sizes))
    return [min(math.prod(mode_sizes[:cut]), math.prod(mode_sizes[cut:])) for cut in cuts]


def check_ranks(mode_sizes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise UserError unless there is one rank between each two modes that its unfolding allows."""
    largest = largest_ranks(mode_sizes)
    if len(ranks) != len(largest):
        raise UserError(f"{len(mode_sizes)} mode sizes have {len(largest)} ranks between them, not {len(ranks)}")
    for cut, (rank, most) in enumerate(zip(ranks, largest, strict=True), 1):
        # A rank beyond what its neighbour and the mode between them span is as impossible as one beyond the unfolding.
        left = ranks[cut - 2] * mode_sizes[cut - 1] if cut > 1 else most
        right = ranks[cut] * mode_sizes[cut] if cut < len(ranks) else most
        if not 1 <= rank <= min(most, left, right):
            raise UserError(
                f"rank {rank} after mode {cut} of {' x '.join(map(str, mode_sizes))} is impossible: "
                f"choose between 1 and {min(most, left, right)}"
            )


def core_shapes(mode_sizes: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(r_{k-1}, I_k, r_k) of each core."""
    ends = [1, *ranks, 1]
    return [(ends[k], size, ends[k + 1]) for k, size in enumerate(mode_sizes)]


def numbers_of(mode_sizes: Sequence[int], ranks: Sequence[int]) -> int:
    """What one tensor costs: sum r_{k-1} I_k r_k."""
    return sum(math.prod(shape) for shape in core_shapes(mode_sizes, ranks))


def ranks_under(mode_sizes: Sequence[int], most_numbers: float) -> list[int] | None:
    """The largest equal ranks, each cut to what it can be, that cost at most ``most_numbers``; None where rank 1 costs
    more."""
    largest = largest_ranks(mode_sizes)
    best = None
    for rank in range(1, max(largest) + 1):
        ranks = [min(rank, most) for most in largest]
        if numbers_of(mode_sizes, ranks) > most_numbers:
            break
        best = ranks
    return best


def factorisations(size: int, least: int = 2) -> list[tuple[int, ...]]:
    """Every way to write ``size`` as a product of factors >= ``least`` in rising order, ``size`` alone included."""
    found: list[tuple[int, ...]] = [(size,)] if size >= least else []
    for factor in range(least, math.isqrt(size) + 1):
        if size % factor == 0:
            found += [(factor, *rest) for rest in factorisations(size // factor, factor)]
    return found


def search_shape(
    weight: Tensor, most_numbers: float, mode_sizes: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """(mode sizes, ranks) that cost at most ``most_numbers`` a row and lose least on a sample of ``weight`` [V, D].

    Tried are all factorisations of D in rising order, or only ``mode_sizes``, each with the largest equal ranks that
    the budget allows. Raises UserError where no shape is so small.
    """
    size = weight.shape[1]
    shapes: Sequence[Sequence[int]] = [s for s in factorisations(size) if len(s) > 1]
    if mode_sizes is not None:
        shapes = [mode_sizes]
    allowed = [(list(shape), ranks) for shape in shapes if (ranks := ranks_under(shape, most_numbers)) is not None]
    if not allowed:
        least = min((numbers_of(shape, [1] * (len(shape) - 1)) for shape in shapes), default=size)
        raise OutOfReach(
            f"compression {size / most_numbers:.4g} is out of reach: a tensor train of {size} numbers takes at least "
            f"{least}, choose at most {size / least:.2f}, or another shape"
        )
    sample = weight[torch.linspace(0, len(weight) - 1, min(SAMPLE_ROWS, len(weight)), device=weight.device).long()]

    def lost(shape_and_ranks: tuple[list[int], list[int]]) -> float:
        cores = tt_svd(sample, *shape_and_ranks)
        return float((contract(cores, *shape_and_ranks) - sample).square().sum())

    return min(allowed, key=lost)


@torch.no_grad()
def tt_svd(weight: Tensor, mode_sizes: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Decompose each row of ``weight`` [V, D] alone: [V, numbers_of(..)], the cores of a row one after the other.

    Each truncated SVD is an eigendecomposition of the Gram matrix of the unfolding's smaller side, in float64, over
    many rows at once; two eigenvalues need a formula only. Raises UserError for impossible sizes and ranks.
    """
    check_mode_sizes(mode_sizes, weight.shape[1])
    check_ranks(mode_sizes, ranks)
    # LAPACK takes the matrices of a batch one by one, so the cores of the machine are used over chunks.
    workers = torch.get_num_threads() if weight.device.type == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(lambda rows: _tt_svd_chunk(rows, mode_sizes, ranks), weight.split(CHUNK))
        return torch.cat(list(parts))


@torch.no_grad()
def _tt_svd_chunk(weight: Tensor, mode_sizes: Sequence[int], ranks: Sequence[int]) -> Tensor:
    rest, width = weight.double(), weight.shape[1]
    count, before = len(rest), 1
    cores = []
    for size, rank in zip(mode_sizes, ranks, strict=False):
        width //= size
        left, rest = truncated_svd(rest.reshape(count, before * size, width), rank)
        cores.append(left.reshape(count, before * size * rank))
        before = rank
    return torch.cat([*cores, rest.reshape(count, before * width)], dim=1).to(weight.dtype)


def truncated_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation left @ right of ``matrices`` [B, m, n] in Frobenius norm: left [B, m, rank] orthonormal
    (but for columns of zeros where the matrix has a smaller rank), right [B, rank, n]."""
    _, height, width = matrices.shape
    if rank == height:  # nothing to cut
        return torch.eye(height, dtype=matrices.dtype, device=matrices.device).expand(len(matrices), -1, -1), matrices
    if height <= width:
        left = leading_vectors(matrices @ matrices.mT, rank)
        return left, left.mT @ matrices
    right = leading_vectors(matrices.mT @ matrices, rank)
    left = matrices @ right
    singular_values = left.norm(dim=1, keepdim=True)
    left = left / singular_values.clamp(min=torch.finfo(left.dtype).tiny)
    return left, singular_values.mT * right.mT


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors [B, n, rank] of the largest eigenvalues of symmetric ``gram`` [B, n, n], the largest first."""
    if gram.shape[-1] == 2 and rank == 1:
        angle = 0.5 * torch.atan2(2 * gram[:, 0, 1], gram[:, 0, 0] - gram[:, 1, 1])
        return torch.stack([angle.cos(), angle.sin()], dim=1).unsqueeze(-1)
    return torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)


def contract(cores: Tensor, mode_sizes: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Cores side by side [N, numbers_of(..)] -> the vectors [N, D] that they stand for. Differentiable."""
    shapes = core_shapes(mode_sizes, ranks)
    parts = cores.split([math.prod(shape) for shape in shapes], dim=1)
    return _contract_range(list(parts), shapes)


def _contract_range(parts: list[Tensor], shapes: list[tuple[int, int, int]]) -> Tensor:
    """Neighbouring cores [N, before * size * after] -> one such core [N, before * width * after].

    Halves first: the only large product is the last one, whatever the number of cores.
    """
    if len(parts) == 1:
        return parts[0]
    widths = [shape[1] for shape in shapes]
    cut = min(range(1, len(parts)), key=lambda cut: math.prod(widths[:cut]) + math.prod(widths[cut:]))
    left, right = _contract_range(parts[:cut], shapes[:cut]), _contract_range(parts[cut:], shapes[cut:])
    count, rank = len(left), shapes[cut][0]
    left = left.reshape(count, left.shape[1] // rank, rank)
    right = right.reshape(count, rank, right.shape[1] // rank)
    product = left * right if rank == 1 else left @ right
    return product.reshape(count, product.shape[1] * product.shape[2])
