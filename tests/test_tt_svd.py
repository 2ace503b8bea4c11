"""The batched TT-SVD against tensorly, one row at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import tensor_train
from torch import Tensor

from vocabfold.embeddings.tt_svd import (
    contract,
    factorisations,
    largest_ranks,
    leading_vectors,
    numbers_of,
    ranks_under,
    truncated_svd,
    tt_svd,
)

SHAPES = [
    ([24, 32], [4]),
    ([32, 24], [24]),
    ([8, 8, 12], [4, 7]),
    ([12, 8, 8], [8, 8]),
    ([2] * 8 + [3], [1] * 8),
    ([2] * 8 + [3], [2, 4, 4, 4, 4, 4, 4, 3]),
    ([1, 768], [1]),
]


def by_tensorly(rows: Tensor, mode_sizes: list[int], ranks: list[int]) -> Tensor:
    """Reconstructions [N, D]."""
    found = []
    for row in rows.double().numpy():
        cores = tensor_train(row.reshape(mode_sizes), [1, *ranks, 1])
        found.append(np.asarray(tensorly.tt_to_tensor(cores)).ravel())
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize(("mode_sizes", "ranks"), SHAPES)
def test_reconstructions_are_tensorlys(mode_sizes: list[int], ranks: list[int]) -> None:
    rows = torch.randn(12, 768, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 12).unsqueeze(1)
    rows[:, ::2] *= 5.0
    cores = tt_svd(rows, mode_sizes, ranks)
    assert cores.shape == (12, numbers_of(mode_sizes, ranks)) and cores.dtype == torch.float32
    expected = by_tensorly(rows, mode_sizes, ranks)
    lost = (contract(cores, mode_sizes, ranks).double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert lost.max() < 1e-5


def test_more_rows_than_a_chunk_and_rows_of_lower_rank() -> None:
    rows = torch.randn(1500, 24, generator=torch.Generator().manual_seed(0))
    rows[7] = 0.0
    rows[8] = torch.outer(torch.randn(4), torch.randn(6)).flatten()
    for mode_sizes, ranks in (([4, 6], [3]), ([6, 4], [3])):
        back = contract(tt_svd(rows, mode_sizes, ranks), mode_sizes, ranks)
        assert torch.isfinite(back).all() and (back[7] == 0).all()
        alone = contract(tt_svd(rows[1400:1401], mode_sizes, ranks), mode_sizes, ranks)
        torch.testing.assert_close(back[1400:1401], alone)
        left, values, right = torch.linalg.svd(rows[1499].view(mode_sizes))
        torch.testing.assert_close(back[1499].view(mode_sizes), left[:, :3] * values[:3] @ right[:3])
    torch.testing.assert_close(contract(tt_svd(rows[8:9], [4, 6], [2]), [4, 6], [2]), rows[8:9])
    assert tt_svd(rows[:0], [4, 6], [3]).shape == (0, 30)


def test_left_factors_are_orthonormal_and_products_best() -> None:
    matrices = torch.randn(5, 7, 3, dtype=torch.float64)
    for some in (matrices, matrices.mT):
        left, right = truncated_svd(some, 2)
        torch.testing.assert_close(left.mT @ left, torch.eye(2, dtype=torch.float64).expand(5, -1, -1))
        u, s, v = torch.linalg.svd(some, full_matrices=False)
        torch.testing.assert_close(left @ right, u[..., :2] * s[:, None, :2] @ v[:, :2])


def test_two_eigenvalues_by_formula() -> None:
    root = torch.randn(50, 2, 2, dtype=torch.float64)
    gram = root @ root.mT
    gram[0] = torch.diag(torch.tensor([1.0, 3.0]))
    gram[1] = torch.diag(torch.tensor([3.0, 1.0]))
    expected = torch.linalg.eigh(gram).eigenvectors[..., -1:]
    torch.testing.assert_close(
        (leading_vectors(gram, 1) * expected).sum(1).abs(), torch.ones(50, 1, dtype=torch.float64)
    )


def test_shapes_and_ranks_under_a_budget() -> None:
    assert factorisations(12) == [(12,), (2, 6), (2, 2, 3), (3, 4)]
    assert largest_ranks([2, 3, 4]) == [2, 4]
    # The published 38.40x of 768 numbers is 20 of them: rank 1 and modes that add up to 20.
    assert {sum(shape) for shape in factorisations(768)} >= {19, 20}
    assert ranks_under([24, 32], 768 / 3.4) == [4] and numbers_of([24, 32], [4]) == 224
    assert ranks_under([24, 32], 55) is None
    for most in range(19, 800, 37):
        ranks = ranks_under([2] * 8 + [3], most)
        assert ranks is not None and numbers_of([2] * 8 + [3], ranks) <= most
    # The ranks at the ends stay what they can be while those in the middle grow.
    assert ranks_under([2, 3, 4], 1e9) == [2, 4]
    assert ranks_under([2] * 8 + [3], 66) == [2, 2, 2, 2, 2, 2, 2, 2]
    assert ranks_under([2] * 8 + [3], 133) == [2, 3, 3, 3, 3, 3, 3, 3]
