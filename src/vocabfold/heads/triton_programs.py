"""What the launches of triton_kernels.py run, a program a tile. Sums are float32, and none is made with atomics."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_program(
    logits, slopes, bias, keys, starts, rows, targets, weights, log_prob, hits,
    num_rows, num_groups, stride,
    has_bias: tl.constexpr, has_groups: tl.constexpr, has_weights: tl.constexpr,
    with_slopes: tl.constexpr, with_hits: tl.constexpr,
    block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    exists = row < num_rows
    columns = tl.arange(0, block_columns)
    place = row
    if has_groups:
        group = tl.load(keys + row, mask=exists, other=num_groups)
        counts = exists & (group < num_groups)
        first = tl.load(starts + group, mask=counts, other=0)
        size = tl.load(starts + group + 1, mask=counts, other=0) - first
        place = tl.load(rows + row, mask=exists, other=0)
    else:
        counts = exists
        if has_weights:
            counts = exists & (tl.load(weights + row, mask=exists, other=0.0) != 0.0)
        first = tl.zeros([block_rows], tl.int64)
        size = tl.where(exists, num_groups, 0).to(tl.int64)
    target = tl.load(targets + row, mask=exists, other=0)
    owned = columns[None, :] < size[:, None]
    offsets = row[:, None] * stride + columns[None, :]
    values = tl.load(logits + offsets, mask=owned, other=0.0).to(tl.float32)
    if has_bias:
        values += tl.load(bias + first[:, None] + columns[None, :], mask=owned, other=0.0).to(tl.float32)
    values = tl.where(owned, values, -float("inf"))
    is_target = columns[None, :] == target[:, None]
    # A row that does not count has no column of its own: 0 in place of -inf keeps NaN out of it.
    largest = tl.where(counts, tl.max(values, axis=1), 0.0)
    shifted = values - largest[:, None]
    exponentials = tl.exp(shifted)
    total = tl.where(counts, tl.sum(exponentials, axis=1), 1.0)
    chosen = tl.sum(tl.where(is_target & owned, shifted, 0.0), axis=1) - tl.log(total)
    tl.store(log_prob + place, tl.where(counts, chosen, 0.0), mask=exists)
    if with_hits:
        hit = counts & (tl.argmax(values, axis=1) == target)
        tl.store(hits + place, hit.to(tl.int8), mask=exists)
    if with_slopes:
        slope = tl.where(is_target, 1.0, 0.0) - exponentials / total[:, None]
        if has_weights:
            slope *= tl.load(weights + place, mask=exists, other=0.0).to(tl.float32)[:, None]
        slope = tl.where(owned & counts[:, None], slope, 0.0).to(slopes.dtype.element_ty)
        tl.store(slopes + offsets, slope, mask=exists[:, None] & (columns < stride)[None, :])


@triton.jit
def logits_program(
    hidden, weight, tokens, logits, rows, tile_groups, tile_ends, row_starts, starts,
    num_groups, width, hidden_stride, weight_stride, logit_stride,
    tied: tl.constexpr, precision: tl.constexpr, dtype: tl.constexpr, num_column_blocks,
    block_rows: tl.constexpr, block_columns: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of sorted rows, all of one group, and of a block of its slots: hidden W_g^T."""
    tile = tl.program_id(0) // num_column_blocks
    group = tl.load(tile_groups + tile)
    if group >= num_groups:
        return
    first = tl.load(starts + group)
    size = (tl.load(starts + group + 1) - first).to(tl.int32)
    first_column = (tl.program_id(0) % num_column_blocks) * block_columns
    if first_column >= size:
        return
    begin, end = tl.load(row_starts + group), tl.load(row_starts + group + 1)
    tile -= tl.load(tile_ends + group) - (end - begin + block_rows - 1) // block_rows
    row = begin + tile * block_rows + tl.arange(0, block_rows)
    is_row = row < end
    place = tl.load(rows + row, mask=is_row, other=0).to(tl.int64)
    column = first_column + tl.arange(0, block_columns)
    is_column = column < size
    token = first + column
    if tied:
        token = tl.load(tokens + token, mask=is_column, other=0)
    total = tl.zeros([block_rows, block_columns], tl.float32)
    for start in range(0, width, block_width):
        inner = start + tl.arange(0, block_width)
        is_inner = inner < width
        some = tl.load(
            hidden + place[:, None] * hidden_stride + inner[None, :],
            mask=is_row[:, None] & is_inner[None, :], other=0.0,
        ).to(dtype)  # fmt: skip
        some_weight = tl.load(
            weight + token[None, :].to(tl.int64) * weight_stride + inner[:, None],
            mask=is_column[None, :] & is_inner[:, None], other=0.0,
        ).to(dtype)  # fmt: skip
        total = tl.dot(some, some_weight, total, input_precision=precision)
    tl.store(
        logits + row[:, None].to(tl.int64) * logit_stride + column[None, :],
        total, mask=is_row[:, None] & is_column[None, :],
    )  # fmt: skip


@triton.jit
def grad_hidden_program(
    slopes, weight, tokens, grad_hidden, rows, tile_groups, tile_ends, row_starts, starts,
    num_groups, width, slope_stride, weight_stride, grad_stride,
    tied: tl.constexpr, precision: tl.constexpr, dtype: tl.constexpr, num_width_blocks,
    block_rows: tl.constexpr, block_columns: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """slopes W_g of a tile of sorted rows and a block of the hidden numbers; 0 for rows that do not count."""
    tile = tl.program_id(0) // num_width_blocks
    group = tl.load(tile_groups + tile)
    if group > num_groups:
        return
    is_group = group < num_groups
    first = tl.load(starts + group, mask=is_group, other=0)
    size = (tl.load(starts + group + 1, mask=is_group, other=0) - first).to(tl.int32)
    begin, end = tl.load(row_starts + group), tl.load(row_starts + group + 1)
    tile -= tl.load(tile_ends + group) - (end - begin + block_rows - 1) // block_rows
    row = begin + tile * block_rows + tl.arange(0, block_rows)
    is_row = row < end
    place = tl.load(rows + row, mask=is_row, other=0).to(tl.int64)
    inner = (tl.program_id(0) % num_width_blocks) * block_width + tl.arange(0, block_width)
    is_inner = inner < width
    total = tl.zeros([block_rows, block_width], tl.float32)
    for start in range(0, size, block_columns):
        column = start + tl.arange(0, block_columns)
        is_column = column < size
        token = first + column
        if tied:
            token = tl.load(tokens + token, mask=is_column, other=0)
        slope = tl.load(
            slopes + row[:, None].to(tl.int64) * slope_stride + column[None, :],
            mask=is_row[:, None] & is_column[None, :], other=0.0,
        )  # fmt: skip
        some_weight = tl.load(
            weight + token[:, None].to(tl.int64) * weight_stride + inner[None, :],
            mask=is_column[:, None] & is_inner[None, :], other=0.0,
        ).to(dtype)  # fmt: skip
        total = tl.dot(slope, some_weight, total, input_precision=precision)
    tl.store(
        grad_hidden + place[:, None] * grad_stride + inner[None, :],
        total.to(grad_hidden.dtype.element_ty), mask=is_row[:, None] & is_inner[None, :],
    )  # fmt: skip


@triton.jit
def grad_weight_program(
    slopes, hidden, tokens, grad_weight, factor, rows, row_starts, starts,
    width, slope_stride, hidden_stride, grad_stride,
    tied: tl.constexpr, precision: tl.constexpr, dtype: tl.constexpr, num_column_blocks, num_width_blocks,
    block_rows: tl.constexpr, block_columns: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """``factor`` times slopes^T hidden over the rows of one group: a block of its slots and of the hidden numbers."""
    group = tl.program_id(0) // (num_column_blocks * num_width_blocks)
    first = tl.load(starts + group)
    size = (tl.load(starts + group + 1) - first).to(tl.int32)
    column = (tl.program_id(0) // num_width_blocks % num_column_blocks) * block_columns + tl.arange(0, block_columns)
    is_column = column < size
    inner = (tl.program_id(0) % num_width_blocks) * block_width + tl.arange(0, block_width)
    is_inner = inner < width
    begin, end = tl.load(row_starts + group), tl.load(row_starts + group + 1)
    total = tl.zeros([block_columns, block_width], tl.float32)
    for start in range(begin, end, block_rows):
        row = start + tl.arange(0, block_rows)
        is_row = row < end
        place = tl.load(rows + row, mask=is_row, other=0).to(tl.int64)
        slope = tl.load(
            slopes + row[:, None].to(tl.int64) * slope_stride + column[None, :],
            mask=is_row[:, None] & is_column[None, :], other=0.0,
        )  # fmt: skip
        some = tl.load(
            hidden + place[:, None] * hidden_stride + inner[None, :],
            mask=is_row[:, None] & is_inner[None, :], other=0.0,
        ).to(dtype)  # fmt: skip
        total = tl.dot(tl.trans(slope), some, total, input_precision=precision)
    token = first + column
    if tied:
        token = tl.load(tokens + token, mask=is_column, other=0)
    total *= tl.load(factor).to(tl.float32)
    tl.store(
        grad_weight + token[:, None].to(tl.int64) * grad_stride + inner[None, :],
        total.to(grad_weight.dtype.element_ty), mask=is_column[:, None] & is_inner[None, :],
    )  # fmt: skip


@triton.jit
def grad_bias_program(
    slopes, grad_bias, row_starts, starts, slope_stride, num_column_blocks,
    block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """The sum of slopes over the rows of one group, of a block of its slots."""
    group = tl.program_id(0) // num_column_blocks
    first = tl.load(starts + group)
    size = (tl.load(starts + group + 1) - first).to(tl.int32)
    column = (tl.program_id(0) % num_column_blocks) * block_columns + tl.arange(0, block_columns)
    is_column = column < size
    begin, end = tl.load(row_starts + group), tl.load(row_starts + group + 1)
    total = tl.zeros([block_rows, block_columns], tl.float32)
    for start in range(begin, end, block_rows):
        row = start + tl.arange(0, block_rows)
        total += tl.load(
            slopes + row[:, None].to(tl.int64) * slope_stride + column[None, :],
            mask=(row < end)[:, None] & is_column[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
    tl.store(grad_bias + first + column, tl.sum(total, axis=0), mask=is_column)
