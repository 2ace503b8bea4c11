"""The folded softmax P(v|h) = P(g|h) P(t|g, h): first the group, then the token within it (arXiv 2411.06371).

L = CrossEntropy(W_group h, g) + CrossEntropy(token scores of the true group g, t) is the exact negative log
likelihood of that distribution; nothing is approximated in training, and nothing of size N x V is ever built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.base import (
    Head,
    HeadLoss,
    counted_targets,
    log_softmax,
    smoothed_log_frequency,
)
from vocabfold.heads.kernels import (
    FIXED_CHUNK_ELEMENTS,
    each_log_prob,
    has_fixed_shapes,
    product_dtype,
    total_log_prob,
)
from vocabfold.heads.loss_options import check_softcap, rowwise_product, soft_cap
from vocabfold.heads.partition import Partition
from vocabfold.heads.readers import GroupReader
from vocabfold.heads.scorers import TokenScorer
from vocabfold.heads.softmax_kernel import SoftmaxKernel
from vocabfold.heads.visiting import TemperedGroups, cut_to_nucleus, draw, topk_by_visits


class FoldedHead(Head):
    """A group scorer W_group [G, D] and a token scorer on a partition of the vocabulary.

    W_group starts as normal(0, ``init_std``). ``with_bias`` adds a bias [G] to the groups' logits, 0 at first: see
    ``start_from_counts``. A ``softcap`` bounds the logits of both: cap * tanh(logit / cap). With a ``group_reader``
    the groups' logits are linear in its features [N, F], W_group is [G, F], and its columns beyond D start as 0.
    Raises UserError for a softcap that is not positive, or with a scorer that computes its gradients in the forward
    pass.
    """

    def __init__(
        self,
        hidden_size: int,
        partition: Partition,
        scorer: TokenScorer,
        init_std: float = 0.02,
        softcap: float | None = None,
        with_bias: bool = False,
        group_reader: GroupReader | None = None,
    ) -> None:
        check_softcap(softcap)
        if softcap is not None and scorer.gradients_in_forward:
            raise UserError(
                "head.softcap works with the plain scorers only: use head.scorer=scale_shift, low_rank or "
                "linear_looped, or head=full or adaptive"
            )
        super().__init__(hidden_size, partition.vocabulary_size)
        self.softcap = scorer.softcap = softcap
        self.partition = partition
        self.scorer = scorer
        self.with_bias = with_bias
        self.group_reader = group_reader
        self._make_group_step(init_std, with_bias)

    def _make_group_step(self, init_std: float, with_bias: bool) -> None:
        num_features = self.hidden_size if self.group_reader is None else self.group_reader.num_features
        rows = nn.init.normal_(torch.empty(self.partition.num_groups, self.hidden_size), std=init_std)
        # Drawn by itself: a part of a wider tensor would take other random numbers.
        self.group_weight = nn.Parameter(F.pad(rows, (0, num_features - self.hidden_size)))
        self.group_bias = nn.Parameter(torch.zeros(self.partition.num_groups)) if with_bias else None

    @property
    def capturable(self) -> bool:
        """See Head.capturable."""
        return self.scorer.capturable

    @property
    def _group_parameters(self) -> tuple[Tensor, ...]:
        return (self.group_weight,) if self.group_bias is None else (self.group_weight, self.group_bias)

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """See Head.start_from_counts. A group's bias is the log of its tokens' frequency, and so within it."""
        if not self.with_bias:
            super().start_from_counts(counts)
            return
        self._start_from(smoothed_log_frequency(counts.to(self.partition.order.device)))

    def prepare_to_decode(self) -> None:
        """See Head.prepare_to_decode."""
        self.scorer.prepare_to_decode()

    def _start_from(self, log_frequency: Tensor) -> None:
        frequency = log_frequency.new_zeros(self.partition.num_groups)
        frequency.index_add_(0, self.partition.group_of, log_frequency.exp())
        self._start_groups_from(frequency.log())
        self.scorer.start_from(log_frequency)

    def _start_groups_from(self, log_frequency: Tensor) -> None:
        assert self.group_bias is not None
        self.group_bias.copy_(log_frequency)

    def _group_features(self, hidden: Tensor) -> Tensor:
        """What the groups' logits are linear in: ``hidden`` [N, D] -> [N, F]."""
        return self.scorer.before_group(hidden) if self.group_reader is None else self.group_reader(hidden)

    def _group_logits(self, hidden: Tensor) -> Tensor:
        features = self._group_features(hidden)
        return soft_cap(F.linear(features, self.group_weight, self.group_bias), self.softcap)

    def group_log_prob(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> log P(g | h) [N, G] in nats."""
        return log_softmax(self._group_logits(hidden))

    def _group_and_slot(self, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        tokens = targets.masked_fill(~counted, 0)  # an ignored target takes any token's place; it never counts
        # index_select refuses a negative token that indexing would wrap around to the end of the vocabulary.
        return self.partition.group_of.index_select(0, tokens), self.partition.slot_of.index_select(0, tokens)

    def loss(self, hidden: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """See Head.loss. Parts: ``group_loss``, ``token_loss``; where asked for ``group_accuracy`` (the likeliest
        group is the target's) and ``token_accuracy`` (the likeliest slot of the target's own group is the target's)."""
        counted, num_targets = counted_targets(targets)
        groups, slots = self._group_and_slot(targets, counted)
        group_total, group_hits = self._group_total(hidden, groups, counted, with_accuracy)
        token_total, token_hits = self.scorer.total_log_prob(hidden, groups, slots, counted, with_accuracy)
        divisor = num_targets.clamp(min=1)
        parts: dict[str, Tensor] = {}
        if group_hits is not None and token_hits is not None:
            parts |= {"group_accuracy": group_hits / divisor, "token_accuracy": token_hits / divisor}
        group_loss, token_loss = -group_total / divisor, -token_total / divisor
        parts |= {"group_loss": group_loss.detach(), "token_loss": token_loss.detach()}
        return HeadLoss(group_loss + token_loss, num_targets, parts)

    def _group_total(
        self, hidden: Tensor, groups: Tensor, counted: Tensor, with_hits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(sum of log P(group) over the rows ``counted``, how many are the likeliest group, where asked for)."""
        if self.scorer.gradients_in_forward:
            view = None if self.group_reader is None or has_fixed_shapes(hidden) else self.group_reader.view()
            states, own = (self._group_features(hidden), ()) if view is None else (hidden, view.parameters)
            kernel = SoftmaxKernel(groups, counted, product_dtype(hidden), view)
            return total_log_prob(kernel, (states, *self._group_parameters, *own), with_hits)
        logits = self._group_logits(hidden)
        log_prob = -F.cross_entropy(logits, groups, reduction="none")
        hits = ((logits.detach().argmax(dim=-1) == groups) & counted).sum() if with_hits else None
        return torch.where(counted, log_prob, 0.0).sum(), hits

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See Head.target_log_prob."""
        counted, _ = counted_targets(targets)
        groups, slots = self._group_and_slot(targets, counted)
        group_log_prob = self._each_group_log_prob(hidden, groups, counted)
        return torch.where(counted, group_log_prob + self.scorer.target_log_prob(hidden, groups, slots), 0.0)

    def _each_group_log_prob(self, hidden: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
        if self.softcap is not None:
            return self.group_log_prob(hidden).gather(-1, groups.unsqueeze(-1)).squeeze(-1)
        kernel = SoftmaxKernel(groups, counted, product_dtype(hidden))
        return each_log_prob(kernel, (self._group_features(hidden), *self._group_parameters))

    def _log_prob_and_normalisers(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        counted, _ = counted_targets(targets)
        groups, slots = self._group_and_slot(targets, counted)
        group_log_prob, normalisers = self._group_log_prob_and_normalisers(hidden, groups, counted)
        token_log_prob = self.scorer.target_log_prob(hidden, groups, slots)
        token_logit = self.scorer.target_logit(hidden, groups, slots)
        return group_log_prob + token_log_prob, [*normalisers, token_logit - token_log_prob]

    def _group_log_prob_and_normalisers(
        self, hidden: Tensor, groups: Tensor, counted: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        log_prob = self._each_group_log_prob(hidden, groups, counted)
        # log P = logit - log normaliser: one more logit a row tells each normaliser.
        logit = rowwise_product(self._group_features(hidden), F.embedding(groups, self.group_weight))
        if self.group_bias is not None:
            logit = logit + self.group_bias[groups]
        return log_prob, [soft_cap(logit, self.softcap) - log_prob]

    def log_prob(self, hidden: Tensor) -> Tensor:
        """See Head.log_prob."""
        by_position = self.scorer.position_log_prob(hidden)
        group_at = self.partition.group_of[self.partition.order]
        by_position = by_position + self.group_log_prob(hidden)[:, group_at]
        return by_position[:, self.partition.position_of]

    def tokens_log_prob(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """``hidden`` [N, D], ``tokens`` [N, C] -> log P of C tokens of each row, [N, C] in nats."""
        groups, slots = self.partition.group_of[tokens], self.partition.slot_of[tokens]
        repeated = hidden.repeat_interleave(tokens.shape[1], dim=0)
        within = self.scorer.target_log_prob(repeated, groups.flatten(), slots.flatten()).view(tokens.shape)
        return self.group_log_prob(hidden).gather(-1, groups) + within

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See Head.topk. Exact without [N, V] but on CUDA: see visiting.topk_by_visits. There the host would wait for
        the device at every visit, and whole rows are computed, not many at a time."""
        self.check_k(k)
        if has_fixed_shapes(hidden):
            found = [Head.topk(self, rows, k) for rows in self._few_rows(hidden)]
            return torch.cat([values for values, _ in found]), torch.cat([tokens for _, tokens in found])
        return topk_by_visits(self.partition, self.scorer, hidden, self.group_log_prob(hidden), k)

    def _few_rows(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden.split(max(1, FIXED_CHUNK_ELEMENTS // self.vocabulary_size))

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See Head.sample. On CUDA from whole rows, as ``topk``. Elsewhere exact without [N, V]: with ``top_k`` through
        ``topk``; otherwise a group is drawn, then a token, which with ``top_p`` is cut to the nucleus."""
        self.check_sampling(temperature, top_k, top_p)
        if has_fixed_shapes(hidden):
            rows = self._few_rows(hidden)
            return torch.cat([Head.sample(self, part, temperature, top_k, top_p, generator) for part in rows])
        if temperature == 0 or top_k is not None:
            return super().sample(hidden, temperature, top_k, top_p, generator)
        log_ratio = self.group_log_prob(hidden).double()
        if temperature != 1.0:
            log_ratio -= self.topk(hidden, 1)[0].double()
        # Below this nothing changes any more, and quotients would overflow.
        groups = TemperedGroups(self.partition, self.scorer, hidden, log_ratio, max(temperature, 1e-100))
        tokens, log_weights = draw(groups, generator)
        if top_p is not None and top_p < 1:
            return cut_to_nucleus(groups, tokens, log_weights, top_p, generator)
        return tokens
