"""Other bounds than int8 rows: how many of an output layer's rows each would leave to be scored by the model's own.

A row is left where its bound reaches the best logit, the most that any cache of likely tokens could know beforehand.
All are proven, none is computed fast here: what counts is how much they leave. Rounding of float32 is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vector_norm

from vocabfold.hugging_face import ScreenedHead

NUM_CLUSTERS, ITERATIONS = 256, 3
GROUP = 32  # columns that share a scale
ROWS_AT_A_TIME = 16_384
Bound = Callable[[Tensor], Tensor]  # states [B, D] -> bounds of the logits from above [B, V]


def shares_left(head: ScreenedHead, hidden: Tensor) -> dict[str, float]:
    """``hidden`` [B, D], a few at a time -> the mean share of the V rows that each bound leaves, from 0 to 1."""
    rows, hidden = head.weight.float(), hidden.float()
    best = (hidden @ rows.T).amax(dim=-1, keepdim=True)
    size = rows.shape[1]

    def of_int8(states: Tensor) -> Tensor:
        rounded = head.quantised.round_states(states, parts=2)
        upper = head.quantised.upper_bounds(rounded)[:, : len(rows)]
        return upper * rounded.scale.float().unsqueeze(-1)

    bounds: dict[str, Bound] = {
        "int8 rows": of_int8,
        "int4 rows": rounded_rows(rows, 7, size),
        f"int4 rows, a scale for {GROUP} columns": rounded_rows(rows, 7, GROUP),
        "half of the directions": low_rank(rows, size // 2),
        "a quarter of the directions": low_rank(rows, size // 4),
        f"{NUM_CLUSTERS} clusters": clusters(rows),
    }
    return {name: float((bound(hidden) >= best).float().mean()) for name, bound in bounds.items()}


def rounded_rows(rows: Tensor, largest_step: int, group: int) -> Bound:
    """Rows as integers within ``largest_step`` with a scale for every ``group`` columns: w.h <= q.h + sum |r| |h|."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).unflatten(-1, (-1, group))
    scale = padded.abs().amax(dim=-1, keepdim=True) / largest_step
    kept = torch.where(scale > 0, (padded / scale).round(), 0.0) * scale
    residual = vector_norm(padded - kept, dim=-1)

    def bound(states: Tensor) -> Tensor:
        parts = torch.nn.functional.pad(states, (0, kept.shape[1] * group - states.shape[1]))
        norms = vector_norm(parts.unflatten(-1, (-1, group)), dim=-1)
        return parts @ kept.flatten(1).T + norms @ residual.T

    return bound


def low_rank(rows: Tensor, rank: int) -> Bound:
    """The ``rank`` directions in which the rows are largest; the rest by its norms: w.h <= w'.h' + |w''| |h''|."""
    _, directions = torch.linalg.eigh(rows.T @ rows)
    first, rest = directions[:, -rank:], directions[:, :-rank]
    kept, norms = rows @ first, vector_norm(rows @ rest, dim=-1)
    return lambda states: (states @ first) @ kept.T + vector_norm(states @ rest, dim=-1, keepdim=True) * norms


def clusters(rows: Tensor) -> Bound:
    """Rows around the centres of clusters (Lloyd, IEEE Trans. Inf. Theory 28, 1982): w.h <= c.h + |w - c| |h| at most,
    with the largest |w - c| of the cluster, so that a cluster is kept or left as a whole."""
    count = min(NUM_CLUSTERS, len(rows))
    centres = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(ITERATIONS):
        nearest = _nearest(rows, centres)
        number = torch.bincount(nearest, minlength=count).clamp(min=1).unsqueeze(-1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, rows) / number
    nearest = _nearest(rows, centres)
    distance = vector_norm(rows - centres[nearest], dim=-1)
    radius = torch.zeros(count).scatter_reduce_(0, nearest, distance, "amax")
    return lambda states: (states @ centres.T + vector_norm(states, dim=-1, keepdim=True) * radius)[:, nearest]


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    half_norms = centres.square().sum(dim=-1) / 2
    return torch.cat([(some @ centres.T - half_norms).argmax(dim=-1) for some in rows.split(ROWS_AT_A_TIME)])
