"""An int8 copy of an output layer's rows that bounds every logit by a proven error.

Legend: V rows, D columns, B hidden states; u = 2^-24, the rounding unit of float32.

**Rows.** Row w of the layer is kept as integers q, |q_i| <= 127, and one float32 number a: w = a q + r. Norms of the
residual r and of a q are computed in float64 from the numbers that are really kept.

**Hidden states.** h = b x + e with one number b a state. x = 256 x1 + x0, integers with |x1| <= 127 and
-128 <= x0 <= 127: both halves are rows of the same int8 product, which reads the int8 rows once. x may also be x1
alone; but real states have a few columns that are much larger than the others, and bounds are then too loose to help.

**Bound.** w.h = r.h + a q.h = r.h + a q.e + a b q.x, so by Cauchy-Schwarz

    |w.h - a b q.x| <= |r| |h| + |a q| |e|.

The product is exact in int32 (D * 127 * 128 < 2^31 for D < 132,000). What float32 rounds after it: the conversion,
the factor a, the sum of both halves, and the sum with the bound: four times at most u, of numbers that are at most
|a q| n with n = |256 x1| + |x0| (|x1| without halves). We allow 8 u |a q| n.

**The dense layer rounds too.** A sum of D float32 products in any order, with or without fused multiply-add, differs
from w.h by at most g |w| |h|, g = D u / (1 - D u) (Higham, Accuracy and Stability of Numerical Algorithms, section
3.1), and |w| <= |r| + |a q|. Rows in bfloat16 have exact float32 products; torch on a CPU sums them in float32 and
rounds the sum once to bfloat16, which keeps order. So with g for D + 8 (room for instructions that round products in
pairs) what the dense layer accumulates is at most

    a b q.x + A |r| + C |a q|,   A = (1 + g) |h|,   C = |e| + 8 u b n + g |h|.

Kept for each row is m = |r| + k |a q| with a constant k (one for each way to round states), for each state
t = max(A, C / k). Then t m >= A |r| + C |a q|, and **a b q.x + t m bounds the logit from above, a b q.x - t m from
below**, at one multiply-add a row.

**Underflow.** Rows below 2^-100 are kept as q = 0, m is at least 2^-70 and states with max |h| < 2^-20 or with
|w| |h| or |w| |h| / b >= 2^120 for some row are not bounded (``in_range``): what a product or a sum loses by
underflow, at most D 2^-126, is then below t m, and nothing overflows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from vocabfold.errors import UserError
from vocabfold.hugging_face.int8_product import int8_product

ROUNDING_UNIT = 2.0**-24
LARGEST_STEP = 127
SHARES = {1: 2.0**-7, 2: 2.0**-12}  # k by the number of int8 parts of a state: about |e| / |h|
SMALLEST_ROW, SMALLEST_MARGIN, SMALLEST_STATE, LARGEST_LOGIT = 2.0**-100, 2.0**-70, 2.0**-20, 2.0**120
INFLATION = 1 + 1e-6  # more than what computing a bound in float64 and storing it in float32 loses
ROWS_AT_A_TIME = 4096
BLOCK = 128  # rows in a block of bounds; their largest tells whether any of them matters
PANEL = 512 * BLOCK  # rows of one int8 product: at most 8 MiB of sums for 16 states in halves, however large V is
LARGEST_HIDDEN_SIZE = 65_536


def accumulation_error(hidden_size: int) -> float:
    """g of the module's docstring: the relative error of a float32 sum of D products, in any order."""
    terms = (hidden_size + 8) * ROUNDING_UNIT
    return terms / (1 - terms)


@dataclass(frozen=True)
class States:
    """B hidden states, rounded. ``steps`` [B, D]: x1 of all, or [2 B, D]: then x0 of all too (float32).

    ``scale`` b [B] and ``reach`` t / b [B], both float64; ``in_range`` [B]: whether the bound holds for the state.
    ``margin`` m [W]: that of the rows for states rounded so.
    """

    steps: Tensor
    scale: Tensor
    margin: Tensor
    reach: Tensor
    in_range: Tensor

    def one(self, index: int) -> States:
        """The state ``index`` alone."""
        batch, place = len(self.scale), slice(index, index + 1)
        steps = torch.cat([self.steps[start + index, None] for start in range(0, len(self.steps), batch)])
        return States(steps, self.scale[place], self.margin, self.reach[place], self.in_range[place])


class QuantisedRows:
    """``rows`` [V, D], float32 or bfloat16 on a CPU, as int8.

    Zero rows with a bound below every other follow up to a multiple of BLOCK: W rows in all. Raises UserError for rows
    that are not finite or too many columns, and where torch has no exact int8 product.
    """

    def __init__(self, rows: Tensor) -> None:
        self.num_rows, self.hidden_size = rows.shape
        if self.hidden_size > LARGEST_HIDDEN_SIZE:
            raise UserError(
                f"the screen bounds rows of at most {LARGEST_HIDDEN_SIZE:,} columns, not {self.hidden_size:,}"
            )
        self.num_padded = -(-self.num_rows // BLOCK) * BLOCK
        steps = torch.zeros(self.num_padded, self.hidden_size, dtype=torch.int8)
        self.row_scale = torch.zeros(self.num_padded)
        self.margins = {parts: torch.full((self.num_padded,), -torch.inf) for parts in SHARES}
        self.largest_norm = 0.0
        for start in range(0, self.num_rows, ROWS_AT_A_TIME):
            part = slice(start, min(start + ROWS_AT_A_TIME, self.num_rows))
            self._quantise(rows[part].double(), steps[part], part)
        self.starts = range(0, self.num_padded, PANEL)
        self.products = [
            int8_product(steps[start : start + PANEL], self.row_scale[start : start + PANEL]) for start in self.starts
        ]

    def _quantise(self, rows: Tensor, steps: Tensor, part: slice) -> None:
        largest = rows.abs().amax(dim=-1)
        if not bool(largest.isfinite().all()):
            bad = part.start + int((~largest.isfinite()).nonzero()[0])
            raise UserError(f"row {bad} of the output layer is not finite: no softmax over these rows exists")
        scale = torch.where(largest < SMALLEST_ROW, 0.0, largest / LARGEST_STEP).float()
        exact_scale = scale.double().unsqueeze(-1)
        rounded = torch.where(exact_scale > 0, rows / exact_scale, 0.0).round().clamp(-127, 127)
        steps.copy_(rounded)
        kept = exact_scale * rounded
        residual_norm, kept_norm = vector_norm(rows - kept, dim=-1), vector_norm(kept, dim=-1)
        self.row_scale[part] = scale
        for parts, share in SHARES.items():
            margin = (residual_norm + share * kept_norm) * INFLATION
            self.margins[parts][part] = margin.clamp(min=SMALLEST_MARGIN).float()
        self.largest_norm = max(self.largest_norm, float(vector_norm(rows, dim=-1).max()))

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads: the int8 rows, their scales and margins."""
        return self.num_padded * (self.hidden_size + 8)

    def round_states(self, hidden: Tensor, parts: int = 2) -> States:
        """``hidden`` [B, D] -> its rounded form, in 2 ``parts`` of 8 bits or 1."""
        exact = hidden.double()
        largest = exact.abs().amax(dim=-1)
        norm = vector_norm(exact, dim=-1)
        base = 256 if parts == 2 else 1
        in_range = largest.isfinite() & (largest >= SMALLEST_STATE) & (norm * self.largest_norm < LARGEST_LOGIT)
        in_range &= norm / largest * LARGEST_STEP * base * self.largest_norm < LARGEST_LOGIT
        exact = torch.where(in_range.unsqueeze(-1), exact, 0.0)
        scale = torch.where(in_range, largest / (LARGEST_STEP * base), 1.0).unsqueeze(-1)
        whole = (exact / scale).round()
        high = (whole / base).round()
        low = whole - base * high
        steps = torch.cat([high, low] if parts == 2 else [high]).float()
        # Everything below is in units of b.
        rest = vector_norm(exact / scale - whole, dim=-1)
        rounded = 8 * ROUNDING_UNIT * (base * vector_norm(high, dim=-1) + vector_norm(low, dim=-1))
        scale = scale.squeeze(-1)
        length = norm / scale
        error = accumulation_error(self.hidden_size)
        reach = torch.maximum((1 + error) * length, (rest + rounded + error * length) / SHARES[parts])
        reach = torch.where(in_range, reach * INFLATION, 0.0)
        return States(steps, scale, self.margins[parts], reach, in_range)

    def product(self, steps: Tensor) -> Tensor:
        """``steps`` [B, D] of States -> the rows times these, times the row's scale: [B, W] float32."""
        parts = [product(steps) for product in self.products]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def upper_bounds(self, states: States) -> Tensor:
        """Bounds of the logits from above, divided by the state's ``scale``: [B, W] float32; see the class for W.

        The bound from below is this less ``2 reach margin``. Rows of states out of range hold nothing of use.
        """
        if len(self.starts) == 1:
            return next(self.panels(states))[1]
        upper = torch.empty(len(states.scale), self.num_padded)
        for start, panel in self.panels(states):  # one by one: each holds both of its halves
            upper[:, start : start + panel.shape[1]] = panel
        return upper

    def panels(self, states: States) -> Iterator[tuple[int, Tensor]]:
        """``upper_bounds``, PANEL rows at a time: (the first row, [B, at most PANEL])."""
        reaches = states.reach.tolist()
        for start, product in zip(self.starts, self.products, strict=True):
            upper = product(states.steps)
            if len(upper) > len(reaches):
                high, low = upper.chunk(2)
                upper = low.add_(high, alpha=256)
            margin = states.margin[start : start + upper.shape[1]]
            for row, reach in zip(upper, reaches, strict=True):
                row.add_(margin, alpha=reach)
            yield start, upper
