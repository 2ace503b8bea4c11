"""A card's share of a model that is spread over several: its head's rows, and what it computes of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vocabfold.heads import FoldedHead, FullHead, SortedLinearScorer, equal_partition
from vocabfold.heads.kernels import each_log_prob, product_dtype, total_log_prob
from vocabfold.heads.softmax_kernel import SoftmaxKernel
from vocabfold.models.gpt import GPTConfig

CARDS = 8
VOCABULARY_SIZE = 1_000_000
SEQUENCE_LENGTH = 2048
BACKBONE = GPTConfig(
    vocabulary_size=VOCABULARY_SIZE, hidden_size=2048, num_layers=20, num_heads=16, max_positions=SEQUENCE_LENGTH
)
FULL, CHUNKED, FOLDED = "full", "full, in chunks", "folded"
REPLICATED, FSDP, VOCABULARY = "replicated", "FSDP", "vocabulary-sharded"
LAYOUTS = {
    REPLICATED: (FULL, CHUNKED, FOLDED),
    FSDP: (FULL, CHUNKED, FOLDED),
    VOCABULARY: (CHUNKED, FOLDED),
}


@dataclass(frozen=True)
class Case:
    """How the model lies on the cards, its head, and the sequences that a card takes in a step."""

    layout: str
    head: str
    sequences: int

    @property
    def tokens(self) -> int:
        """N of one card."""
        return self.sequences * SEQUENCE_LENGTH


class ChunkedLoss(nn.Module):
    """The mean loss of a full softmax, a chunk of rows at a time, with gradients from the forward pass: what Liger and
    torch's linear_cross_entropy do."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """``hidden`` [N, D], ``targets`` [N]."""
        kernel = SoftmaxKernel(targets, torch.ones_like(targets, dtype=torch.bool), product_dtype(hidden))
        return -total_log_prob(kernel, (hidden, self.weight), False)[0] / len(targets)


class PartOfFull(nn.Module):
    """What one card computes of a ShardedFullHead: V / R logits for the hidden states of all R cards, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(VOCABULARY_SIZE // CARDS, BACKBONE.hidden_size))

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """``hidden`` [N, D], ``targets`` [N]."""
        everybody, tokens = hidden.repeat(CARDS, 1), targets.repeat(CARDS) % len(self.weight)
        kernel = SoftmaxKernel(tokens, torch.ones_like(tokens, dtype=torch.bool), product_dtype(hidden))
        return -each_log_prob(kernel, (everybody, self.weight))[: len(targets)].mean()


class PartOfFolded(nn.Module):
    """What one card computes of a ShardedFoldedHead: all groups for its own hidden states, and the tokens of its own
    groups for as many as come to it when they are spread evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.partition = equal_partition(VOCABULARY_SIZE)
        self.group_weight = nn.Parameter(torch.empty(self.partition.num_groups, BACKBONE.hidden_size))
        self.own = equal_partition(VOCABULARY_SIZE // CARDS, self.partition.num_slots)
        self.scorer = SortedLinearScorer(BACKBONE.hidden_size, self.own)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """``hidden`` [N, D], ``targets`` [N]."""
        counted = torch.ones_like(targets, dtype=torch.bool)
        kernel = SoftmaxKernel(self.partition.group_of[targets], counted, product_dtype(hidden))
        total, _ = total_log_prob(kernel, (hidden, self.group_weight), False)
        sent = hidden[torch.arange(len(hidden))]  # sorted by card
        received = sent.clone()
        tokens = targets % self.own.vocabulary_size
        log_prob = self.scorer.target_log_prob(received, self.own.group_of[tokens], self.own.slot_of[tokens])
        return -(total + log_prob.sum()) / len(targets)


def head_of(case: Case, embedding: nn.Parameter) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The head, with the embedding's rows where all of them lie here, and its loss."""
    if case.layout == VOCABULARY:
        part = PartOfFolded() if case.head == FOLDED else PartOfFull()
        return part, part
    if case.head == CHUNKED:
        chunked = ChunkedLoss(embedding)
        return chunked, chunked
    size = BACKBONE.hidden_size
    head: FullHead | FoldedHead = FullHead(size, VOCABULARY_SIZE, embedding)
    if case.head == FOLDED:
        partition = equal_partition(VOCABULARY_SIZE)
        head = FoldedHead(size, partition, SortedLinearScorer(size, partition, embedding))
    return head, lambda hidden, targets: head.loss(hidden, targets).loss
