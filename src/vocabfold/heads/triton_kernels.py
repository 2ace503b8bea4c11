"""Triton kernels of heads: softmaxes whose slopes are made in one launch, and products of rows sorted by group.

Importing this module needs triton. Nothing here waits for the device, and no launch depends on a value there, so that
all of it can be captured in a CUDA graph. No kernel adds with atomics: the same inputs give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocabfold.heads.triton_programs import (
    grad_bias_program,
    grad_hidden_program,
    grad_weight_program,
    logits_program,
    softmax_program,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of products
MOST_COLUMNS = 16_384  # of a row of logits, which one program holds
ROW_ELEMENTS = 2048  # logits that a program of softmax_of_rows holds where rows are short
ALIGNMENT = 16  # columns of a row of logits are a multiple of this, so that many are loaded at once
SMALLEST = 16  # side of a tile that a product of tiles takes


def softmax_of_rows(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    slopes: Tensor | None,
    with_hits: bool,
    groups: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``logits`` [R, C or more] and ``targets`` [R] -> log P(target) [R] and, where asked for, whether it is the
    likeliest; the slope of the sum of weights x log P goes to ``slopes`` [R, C or more], which may be ``logits``.

    Without ``groups`` all C columns are choices, and a row of weight 0 counts for nothing. ``groups``: (key [R] of each
    row, M for a row that does not count; where each of the M groups begins among the biases, [M + 1]; the place [R] of
    each row in the results and in ``weights``), and a row's choices are its group's.
    """
    num_rows, stride = logits.shape
    log_prob = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    hits = torch.empty(num_rows, dtype=torch.bool, device=logits.device) if with_hits else None
    if num_rows == 0:
        return log_prob, hits
    keys, starts, rows = (targets, targets, targets) if groups is None else groups
    block_columns = max(SMALLEST, triton.next_power_of_2(stride))
    block_rows = max(1, ROW_ELEMENTS // block_columns)
    softmax_program[(triton.cdiv(num_rows, block_rows),)](
        logits, logits if slopes is None else slopes, logits if bias is None else bias, keys, starts, rows, targets,
        logits if weights is None else weights, log_prob, log_prob if hits is None else hits.view(torch.int8),
        num_rows, stride if groups is None else len(starts) - 1, stride,
        has_bias=bias is not None, has_groups=groups is not None, has_weights=weights is not None,
        with_slopes=slopes is not None, with_hits=with_hits,
        block_rows=block_rows, block_columns=block_columns,
        num_warps=4 if block_columns <= 2048 else 8,
    )  # fmt: skip
    return log_prob, hits


@dataclass(frozen=True)
class Tiles:
    """Sides of the tiles of a product, and how a program runs it: ``rows`` of hidden states, ``columns`` of slots and
    ``width`` of hidden numbers."""

    rows: int
    columns: int
    width: int
    num_warps: int = 4
    num_stages: int = 3

    def within(self, num_slots: int, width: int) -> Tiles:
        """No wider than what there is."""
        columns = min(self.columns, max(SMALLEST, triton.next_power_of_2(num_slots)))
        inner = min(self.width, max(SMALLEST, triton.next_power_of_2(width)))
        return Tiles(self.rows, columns, inner, self.num_warps, self.num_stages)


# By whether products are of halves, which tensor cores take, or of float32, which they do not.
LOGITS = {True: Tiles(64, 128, 64), False: Tiles(32, 64, 32, num_stages=2)}
GRAD_HIDDEN = {True: Tiles(64, 64, 128), False: Tiles(32, 32, 64, num_stages=2)}
GRAD_WEIGHT = {True: Tiles(32, 128, 128, num_warps=8), False: Tiles(16, 64, 64, num_stages=2)}
BIAS_TILE = (128, 32)


class SortedProducts:
    """Products of N hidden states, sorted by group, with their groups' matrices W_g of W [.., D].

    ``keys`` [N]: each sorted row's group, M for rows that have none and come last. ``rows`` [N]: their places among the
    hidden states. ``starts`` [M + 1]: where each group's slots begin, among the rows of W or, with ``tokens``, among
    those, which name the rows. ``dtype`` is that of the products; sums are float32.
    """

    def __init__(
        self,
        keys: Tensor,
        rows: Tensor,
        starts: Tensor,
        num_slots: int,
        width: int,
        dtype: torch.dtype,
        tokens: Tensor | None = None,
    ) -> None:
        self.rows, self.starts, self.tokens = rows, starts, starts if tokens is None else tokens
        self.num_groups, self.num_slots, self.width = len(starts) - 1, num_slots, width
        self.stride = triton.cdiv(num_slots, ALIGNMENT) * ALIGNMENT
        halves = dtype != torch.float32
        self.logit_tiles = LOGITS[halves].within(num_slots, width)
        self.hidden_tiles = GRAD_HIDDEN[halves].within(num_slots, width)
        self.weight_tiles = GRAD_WEIGHT[halves].within(num_slots, width)
        self.common = {
            "tied": tokens is not None,
            # Unless that is asked for, float32 is not rounded to TensorFloat-32.
            "precision": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "dtype": {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
        }
        # Rows without a group are one more, the last: their gradient is 0, and it is written with the others'.
        kinds = torch.arange(self.num_groups + 2, dtype=keys.dtype, device=keys.device)
        self.row_starts = torch.searchsorted(keys, kinds, out_int32=True)
        block_rows = self.logit_tiles.rows
        assert block_rows == self.hidden_tiles.rows
        tiles = (self.row_starts.diff() + (block_rows - 1)) // block_rows
        self.tile_ends = tiles.cumsum(0, dtype=torch.int32)
        self.num_tiles = len(keys) // block_rows + min(self.num_groups + 1, len(keys))  # at most
        numbers = torch.arange(self.num_tiles, dtype=torch.int32, device=keys.device)
        self.tile_groups = torch.searchsorted(self.tile_ends, numbers, right=True, out_int32=True)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """``hidden`` [N, D] -> W_g h of the sorted rows, [N, S or more]; anything stands where there is no slot."""
        logits = torch.empty(len(self.rows), self.stride, dtype=torch.float32, device=hidden.device)
        tiles = self.logit_tiles
        blocks = triton.cdiv(self.num_slots, tiles.columns)
        logits_program[(self.num_tiles * blocks,)](
            hidden, weight, self.tokens, logits, self.rows, self.tile_groups, self.tile_ends, self.row_starts,
            self.starts, self.num_groups, self.width, hidden.stride(0), weight.stride(0), self.stride,
            **self.common, num_column_blocks=blocks, **_launch(tiles),
        )  # fmt: skip
        return logits

    def grad_hidden(self, slopes: Tensor, weight: Tensor, hidden: Tensor) -> Tensor:
        """``slopes`` of the sorted rows -> the gradient of ``hidden``, in its order."""
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        tiles = self.hidden_tiles
        blocks = triton.cdiv(self.width, tiles.width)
        grad_hidden_program[(self.num_tiles * blocks,)](
            slopes, weight, self.tokens, grad_hidden, self.rows, self.tile_groups, self.tile_ends, self.row_starts,
            self.starts, self.num_groups, self.width, slopes.stride(0), weight.stride(0), self.width,
            **self.common, num_width_blocks=blocks, **_launch(tiles),
        )  # fmt: skip
        return grad_hidden

    def grad_weight(self, slopes: Tensor, hidden: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        """``factor`` (a number) times the gradient of ``weight``, each row written once."""
        covered = not self.common["tied"] or len(self.tokens) == len(weight)
        make = torch.empty if covered else torch.zeros
        grad_weight = make(weight.shape, dtype=weight.dtype, device=weight.device)
        tiles = self.weight_tiles
        columns, inner = triton.cdiv(self.num_slots, tiles.columns), triton.cdiv(self.width, tiles.width)
        grad_weight_program[(self.num_groups * columns * inner,)](
            slopes, hidden, self.tokens, grad_weight, factor, self.rows, self.row_starts, self.starts,
            self.width, slopes.stride(0), hidden.stride(0), grad_weight.stride(0),
            **self.common, num_column_blocks=columns, num_width_blocks=inner, **_launch(tiles),
        )  # fmt: skip
        return grad_weight

    def grad_bias(self, slopes: Tensor, bias: Tensor) -> Tensor:
        """``slopes`` -> the gradient of ``bias``, one number a slot, in float32."""
        grad_bias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        block_rows, block_columns = BIAS_TILE
        blocks = triton.cdiv(self.num_slots, block_columns)
        grad_bias_program[(self.num_groups * blocks,)](
            slopes, grad_bias, self.row_starts, self.starts, slopes.stride(0), blocks,
            block_rows=block_rows, block_columns=block_columns,
        )  # fmt: skip
        return grad_bias


def _launch(tiles: Tiles) -> dict[str, int]:
    return {
        "block_rows": tiles.rows,
        "block_columns": tiles.columns,
        "block_width": tiles.width,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
