"""Heads alone on a card: forward and backward, against the other ways to the same loss, each beside its floor.

As in training with precision=bf16: hidden states and weights are float32, autocast makes the products bfloat16, and the
casts are in the time. ``cce_filtered`` is cut-cross-entropy as it ships (small gradients dropped), on weights cast to
bfloat16; ``cce`` keeps all gradients, as head=fused does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.cards.bench import Case, Plan, Rates, Work, built_on, captured, measure_cases, measured_rates
from experiments.cards.card_heads import (
    ADAPTIVE,
    CCE,
    CCE_FILTERED,
    CHUNKED,
    COMPILED,
    FOLDED,
    FOLDED_CAPTURED,
    FULL,
    LIGER,
    LINEAR,
    LOW_RANK,
    PAPER,
    SCALE_SHIFT,
    SETTINGS,
    SHORT,
    WIDE,
    for_small_vocabulary,
    zipf_tokens,
)
from experiments.cards.rows import Rows
from vocabfold.errors import UserError
from vocabfold.heads import AdaptiveHead, ConditionedLinearScorer, FoldedHead, Head, build_head
from vocabfold.heads.low_rank import LowRankScorer

KEYS = ("vocabulary_size", "hidden_size", "num_tokens", "precision", "method")
OWN = (
    "num_parameters",
    "flops",
    "least_bytes",
    "matrix_flops_per_second",
    "copied_bytes_per_second",
    "floor_milliseconds",
    "loss_nats",
)
NUM_TOKENS = 16_384
SIZES = ((128_256, 2_048), (50_257, 768), (262_144, 640))  # V, D; the goal's first
# In the order of their value; those of a group take turns, and lie on the card together. The full softmax needs most of
# it alone, and compiling takes longer than all else.
GROUPS = (
    (FOLDED, WIDE, CCE, CCE_FILTERED, LIGER, LINEAR, PAPER, SCALE_SHIFT, LOW_RANK, SHORT, ADAPTIVE, CHUNKED),
    (FULL,),
    (FOLDED_CAPTURED,),
    (COMPILED,),
)
PRECISION = "bf16 products, fp32 weights"


class HeadSide:
    """A head on given hidden states and targets; gradients of both the hidden states and the weights."""

    def __init__(self, method: str, vocabulary_size: int, hidden: Tensor, targets: Tensor) -> None:
        settings = for_small_vocabulary(SETTINGS[method], vocabulary_size)
        rows = nn.Embedding(vocabulary_size, hidden.shape[1], device="meta")  # none is lent
        self.head: Head = built_on(hidden.device, lambda: build_head(settings, vocabulary_size, rows))
        self.hidden = hidden.detach().clone().requires_grad_()
        self.targets = targets
        self.loss = LOSSES.get(method, of_head)(self.head)

    def step(self) -> Tensor:
        """Forward and backward; the loss."""
        with torch.autocast(self.hidden.device.type, torch.bfloat16):
            loss = self.loss(self.hidden, self.targets)
        loss.backward()
        # Gradients of many heads at once would fill the card.
        self.hidden.grad = None
        self.head.zero_grad(set_to_none=True)
        return loss.detach()

    def live(self) -> list[Tensor]:
        """What stands before a step."""
        return [self.hidden, *self.head.parameters(), *self.head.buffers()]


Loss = Callable[[Tensor, Tensor], Tensor]


def of_head(head: Head) -> Loss:
    """The head's own."""
    return lambda hidden, targets: head.loss(hidden, targets).loss


def compiled_full(head: Head) -> Loss:
    """What somebody who has a full softmax would hand to torch.compile."""
    weight = head.get_parameter("weight")

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets)

    return torch.compile(loss, backend="inductor" if weight.is_cuda else "aot_eager")


def cce_as_shipped(head: Head) -> Loss:
    """cut-cross-entropy with its defaults."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise UserError(f"cut-cross-entropy cannot be loaded: {error}") from error
    weight = head.get_parameter("weight")
    return lambda hidden, targets: linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets).float()


LOSSES: dict[str, Callable[[Head], Loss]] = {COMPILED: compiled_full, CCE_FILTERED: cce_as_shipped}


def flops_of(head: Head, targets: Tensor) -> float:
    """Operations of the products, forward and backward, that no way to the head's loss and gradients can do without:
    6 N D C for each layer of C choices that N hidden states of size D take."""
    num_tokens, size = len(targets), head.hidden_size
    if not isinstance(head, FoldedHead):
        return 6.0 * num_tokens * size * head.vocabulary_size
    partition = head.partition
    groups = 6.0 * num_tokens * size * partition.num_groups
    index = partition.multi_index[partition.group_of[targets]]
    counts = torch.bincount(index[index >= 0], minlength=len(partition.multi_groups)).double()
    if isinstance(head, AdaptiveHead):
        for number, layers in zip(counts.tolist(), head.scorer.get_submodule("tail").children(), strict=True):
            groups += 6.0 * number * sum(weight.numel() for weight in layers.parameters())
        return groups
    slots = partition.sizes[partition.multi_groups].double()
    looked_at = float((counts * slots.to(counts.device)).sum())  # slots, over all tokens
    tokens = 6.0 * size * looked_at
    if isinstance(head.scorer, ConditionedLinearScorer):
        tokens += 2 * 6.0 * num_tokens * head.scorer.out.numel()
    if isinstance(head.scorer, LowRankScorer):
        rank = head.scorer.down.shape[1]
        tokens += 6.0 * rank * (float(counts.sum()) * size + looked_at)
    return groups + tokens


def least_bytes_of(side: HeadSide) -> float:
    """Hidden states and weights read once, and a gradient of each written once."""
    return 2.0 * sum(tensor.nbytes for tensor in (side.hidden, *side.head.parameters()))


def case_of(method: str, vocabulary_size: int, hidden: Tensor, targets: Tensor, rates: Rates) -> Case:
    """Of a head at a size."""

    def build() -> Work:
        side = HeadSide(method, vocabulary_size, hidden, targets)
        loss = side.step()
        run: Callable[[], object] = side.step
        if method == FOLDED_CAPTURED:
            if not getattr(side.head, "capturable", False):
                raise UserError("this head waits for the device: it cannot be captured")
            run = captured(side.step, hidden.device)
        flops, least_bytes = flops_of(side.head, targets), least_bytes_of(side)
        columns: dict[str, Any] = {
            "num_parameters": sum(parameter.numel() for parameter in side.head.parameters()),
            "flops": flops,
            "least_bytes": least_bytes,
            "matrix_flops_per_second": rates.flops_per_second,
            "copied_bytes_per_second": rates.bytes_per_second,
            "floor_milliseconds": rates.floor_milliseconds(flops, least_bytes),
            "loss_nats": float(loss),
        }
        return Work(run, side.live, columns, peak_of_building=method == FOLDED_CAPTURED)

    key = {"vocabulary_size": vocabulary_size, "hidden_size": hidden.shape[1], "num_tokens": len(targets)}
    return Case({**key, "precision": PRECISION, "method": method}, build)


def measure_part(rows: Rows, plan: Plan) -> None:
    """All sizes without what has to be compiled, then that."""
    sizes = ((499, 32),) if plan.tiny else SIZES
    num_tokens = 64 if plan.tiny else NUM_TOKENS
    rates = measured_rates(plan, torch.bfloat16)
    for methods in GROUPS:
        for vocabulary_size, hidden_size in sizes:
            if plan.seconds_left <= 0:
                return
            torch.manual_seed(0)
            hidden = torch.randn(num_tokens, hidden_size, device=plan.device)
            targets = zipf_tokens(num_tokens, vocabulary_size, plan.device)
            cases = [case_of(method, vocabulary_size, hidden, targets, rates) for method in methods]
            measure_cases(cases, rows, plan)
