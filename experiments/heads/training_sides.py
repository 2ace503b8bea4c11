"""The heads whose training steps are compared, each with the same backbone and optimizer, on the same batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vocabfold.heads import HeadSettings
from vocabfold.heads.settings import PartitionSettings
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model

FULL, CHUNKED, NO_HEAD, SCALE_SHIFT = "full", "linear_cross_entropy in chunks", "no_head", "scale_shift_sorted"
DEFAULT_ALLOCATOR = ", default allocator"
BESIDE_FULL = ", beside full"  # the rounds of a second run, with the full softmax that keeps its memory
FAST = "_sorted"  # in the name of every scorer that computes its gradients in the forward pass

CHUNKS = (256, 1024, 2048)  # rows at a time of torch's linear_cross_entropy: the fastest is compared
HEAD_ROUNDS = 15  # of the folded heads alone, after the steps: they take milliseconds
FULL_SETTINGS = HeadSettings("full", "full", tied=True)


def folded(scorer: str, tied: bool, order: str = "bpe", shortlist: int = 0) -> HeadSettings:
    """A folded head with groups of the default size."""
    return HeadSettings(scorer, "folded", tied, scorer=scorer, partition=PartitionSettings(order, shortlist=shortlist))


HEADS = {
    SCALE_SHIFT: folded("scale_shift_sorted", tied=False),
    "scale_shift": folded("scale_shift", tied=False),
    "low_rank_sorted": folded("low_rank_sorted", tied=False),
    "linear_sorted tied": folded("linear_sorted", tied=True),
    "linear_sorted tied, frequency": folded("linear_sorted", True, "frequency"),
    "linear_sorted tied, frequency, shortlist 512": folded("linear_sorted", True, "frequency", 512),
    "linear_sorted tied, frequency, shortlist 2048": folded("linear_sorted", True, "frequency", 2048),
    "linear_sorted untied": folded("linear_sorted", tied=False),
}


@dataclass(frozen=True)
class Case:
    """What every process needs to build the same methods: sizes, the batch [B, T] and its targets, orders by name."""

    model: ModelSettings
    vocabulary_size: int
    inputs: Tensor
    targets: Tensor
    orders: dict[str, Tensor | None]


class Side:
    """One model with its optimizer: whole training steps, and its head's forward and backward pass alone."""

    def __init__(self, case: Case, name: str, chunk_rows: int = CHUNKS[0]) -> None:
        torch.manual_seed(0)
        settings = HEADS.get(name, FULL_SETTINGS)
        if name == CHUNKED:
            settings = HeadSettings("chunked", "chunked", tied=True, chunk_rows=chunk_rows)
        self.model = build_model(case.model, settings, case.vocabulary_size, case.orders.get(name))
        self.model.to(case.inputs.device)
        self.case, self.without_head = case, name == NO_HEAD
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)  # as optimizer.py has it
        self.hidden = torch.randn(case.inputs.numel(), case.model.hidden_size, device=case.inputs.device)
        self.hidden.requires_grad_()

    def loss(self) -> Tensor:
        """Of the whole model."""
        return loss_of(self.model, self.case, self.without_head)

    def step(self) -> None:
        """A whole training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def step_and_release(self) -> None:
        """The same, and gradients go: those of many models at once would fill the memory."""
        self.step()
        self.optimizer.zero_grad(set_to_none=True)

    def head_step(self) -> None:
        """Forward and backward of the head, on hidden states that are given."""
        self.optimizer.zero_grad(set_to_none=True)
        self.hidden.grad = None
        self.model.head.loss(self.hidden, self.case.targets.flatten()).loss.backward()

    def head_inputs(self) -> list[Tensor]:
        """What the head's loss depends on."""
        return [self.hidden, *self.model.head.parameters()]


def loss_of(model: ModelWithHead, case: Case, without_head: bool) -> Tensor:
    """The head's loss, or without a head the mean of the hidden states: it only has to send gradients back."""
    if without_head:
        hidden: Tensor = model.backbone(case.inputs)
        return hidden.mean()
    loss: Tensor = model(case.inputs, case.targets).loss
    return loss
