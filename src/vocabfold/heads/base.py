"""The contract that every output head keeps: hidden states to loss, log-probabilities, the best tokens and samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads.loss_options import LossOptions, in_row_chunks
from vocabfold.heads.sampling import check_k, check_sampling, draw_from_sorted, draw_from_whole
from vocabfold.tokens import IGNORE_INDEX


@dataclass
class HeadLoss:
    """``loss``: mean negative log likelihood in nats over the targets that count, 0 (with zero gradients) if none does;
    from ``Head.loss_with`` what its options say.

    ``parts``: named means over the same targets, detached, such as ``group_loss`` and ``token_loss`` in nats, and the
    accuracies (shares from 0 to 1) where they were asked for. ``num_targets``: how many targets counted.
    """

    loss: Tensor
    num_targets: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Head(nn.Module, ABC):
    """A distribution over V tokens for each hidden state. Every method is exact; no head approximates.

    ``training_options``: what ``forward`` adds to the loss while the module is in training mode.
    """

    def __init__(self, hidden_size: int, vocabulary_size: int) -> None:
        super().__init__()
        self.training_options = LossOptions()
        self.hidden_size = hidden_size
        self.vocabulary_size = vocabulary_size

    @property
    def capturable(self) -> bool:
        """Whether on CUDA neither ``loss`` nor its gradients make the host wait for the device, and no shape depends on
        a value: a CUDA graph can then hold a whole training step. Not said of ``loss_with``."""
        return False

    @abstractmethod
    def loss(self, hidden: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """``hidden`` [N, D], ``targets`` [N] -> the mean negative log likelihood over targets != IGNORE_INDEX."""

    @abstractmethod
    def log_prob(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> log P [N, V] in nats, in token order; exp sums to 1 over the V tokens."""

    @abstractmethod
    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """``hidden`` [N, D], ``targets`` [N] -> log P(target) [N] in nats, 0 where the target is IGNORE_INDEX."""

    @abstractmethod
    def _log_prob_and_normalisers(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(log P(target) [N], the log normaliser [N] of each softmax that the target takes part in). Anything may stand
        in the rows of ignored targets."""

    def start_from_counts(self, counts: Tensor) -> None:
        """Make the biases the logs of the tokens' frequencies in a text: ``counts`` [V]. At h = 0 the head then gives
        that text's unigram distribution, which it would have to learn otherwise. Raises UserError without biases."""
        raise UserError("this head has no biases to start from counts: use head.count_biases=false")

    def prepare_to_decode(self) -> None:
        """Take the form that decodes fastest, of a head that is trained no more. Only one that borrows the embedding's
        rows and reads them in another order has something to do: it keeps a copy of them, V x D numbers."""

    def _mean_log_prob(self, hidden: Tensor, normalisers: list[Tensor]) -> Tensor:
        """The mean of log P(v) over the V tokens [N]. ``normalisers``: what _log_prob_and_normalisers returned."""
        return in_row_chunks(lambda rows: self.log_prob(rows).mean(dim=-1), hidden, self.vocabulary_size)

    def loss_with(
        self,
        hidden: Tensor,
        targets: Tensor,
        options: LossOptions,
        weights: Tensor | None = None,
        with_accuracy: bool = False,
    ) -> HeadLoss:
        """``loss`` with ``options``, each row's multiplied by its weight in ``weights`` [N] (any sign).

        A mean divides by the number of targets that count, not by the sum of their weights. Parts, not weighted:
        ``negative_log_likelihood`` and, where they were asked for, ``smoothing_loss`` and ``z_loss`` before their
        factors, and those of ``loss`` with the accuracies. Slower than ``loss``: what ``loss`` computes once is
        computed again in the backward pass. Raises UserError for weights of another shape than the targets.
        """
        if weights is not None and weights.shape != targets.shape:
            shapes = f"{tuple(weights.shape)} for targets of {tuple(targets.shape)}"
            raise UserError(f"weights have the shape {shapes}: give one weight for each target")
        counted, num_targets = counted_targets(targets)
        normalisers: list[Tensor] = []
        if options.label_smoothing == 0 and options.z_loss == 0:
            log_prob = self.target_log_prob(hidden, targets)
        else:
            log_prob, normalisers = self._log_prob_and_normalisers(hidden, targets)
        terms = {"negative_log_likelihood": -log_prob}
        each = -log_prob
        if options.label_smoothing > 0:
            terms["smoothing_loss"] = -self._mean_log_prob(hidden, normalisers)
            share = options.label_smoothing
            each = (1 - share) * each + share * terms["smoothing_loss"]
        if options.z_loss > 0:
            terms["z_loss"] = sum((normaliser.square() for normaliser in normalisers), torch.zeros_like(each))
            each = each + options.z_loss * terms["z_loss"]
        each = torch.where(counted, each, 0.0)
        if weights is not None:
            each = each * torch.where(counted, weights, 0.0)
        divisor = num_targets.clamp(min=1)
        parts = {name: torch.where(counted, term.detach(), 0.0).sum() / divisor for name, term in terms.items()}
        if with_accuracy:
            with torch.no_grad():
                parts |= self.loss(hidden, targets, with_accuracy).parts
        if options.reduction == "none":
            return HeadLoss(each, num_targets, parts)
        total = each.sum()
        return HeadLoss(total if options.reduction == "sum" else total / divisor, num_targets, parts)

    def entropy(self, hidden: Tensor) -> Tensor:
        """The entropy of P(. | h) in nats: ``hidden`` [N, D] -> [N]. Exact, from a few rows of log P at a time."""

        def of_rows(rows: Tensor) -> Tensor:
            log_prob = self.log_prob(rows)
            return -(log_prob.exp() * log_prob).sum(dim=-1)

        return in_row_chunks(of_rows, hidden, self.vocabulary_size)

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` likeliest tokens, best first: (log P [N, k], token [N, k]). Exact.

        Raises UserError unless 1 <= k <= V.
        """
        self.check_k(k)
        best = self.log_prob(hidden).topk(k, dim=-1)
        return best.values, best.indices

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw one token for each hidden state: [N, D] -> [N].

        P(v) ** (1 / temperature), renormalised, is first cut to its ``top_k`` likeliest tokens, then to the smallest
        set of likeliest tokens with at least ``top_p`` of what is left. Temperature 0 takes the likeliest token.
        Raises UserError for a negative temperature, top_k outside 1..V or top_p outside (0, 1].
        """
        self.check_sampling(temperature, top_k, top_p)
        if temperature == 0:
            return self.topk(hidden, 1)[1].squeeze(-1)
        if top_k is not None:
            log_prob, tokens = self.topk(hidden, top_k)
            choice = draw_from_sorted(log_prob, temperature, top_p, generator)
            return tokens.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        return draw_from_whole(self.log_prob(hidden), temperature, top_p, generator)

    def accuracy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The share of targets != IGNORE_INDEX that are the likeliest of all V tokens; 0 where there is no target."""
        counted, num_targets = counted_targets(targets)
        hits = (self.topk(hidden, 1)[1].squeeze(-1) == targets) & counted
        return hits.sum() / num_targets.clamp(min=1)

    def forward(self, hidden: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """``loss``; in training mode with the ``training_options``, if there are any."""
        if self.training and self.training_options != LossOptions():
            return self.loss_with(hidden, targets, self.training_options, with_accuracy=with_accuracy)
        return self.loss(hidden, targets, with_accuracy)

    def check_k(self, k: int) -> None:
        """Raise UserError unless 1 <= k <= V."""
        check_k(k, self.vocabulary_size)

    def check_sampling(self, temperature: float, top_k: int | None, top_p: float | None) -> None:
        """Raise UserError for sampling settings that no distribution has."""
        check_sampling(temperature, top_k, top_p, self.vocabulary_size)


def log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least: autocast on a CPU would leave log-probabilities in bfloat16."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def smoothed_log_frequency(counts: Tensor) -> Tensor:
    """``counts`` [V] of each token in a text -> the log of its frequency [V], float64; each is counted once more, so
    that none is 0."""
    frequency = counts.double() + 1.0
    return (frequency / frequency.sum()).log()


def counted_targets(targets: Tensor) -> tuple[Tensor, Tensor]:
    """(which targets count [N], how many)."""
    counted = targets != IGNORE_INDEX
    return counted, counted.sum()
