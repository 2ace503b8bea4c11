"""A mixture of folded heads on different partitions: P(v|h) = sum over k of w_k(h) P_k(v|h).

Tokens that one partition parts may share a group in another, and the hidden state says which of them to trust. The
logarithm of a sum of softmaxes also has a higher rank than one softmax (arXiv 1711.03953).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads import visiting
from vocabfold.heads.base import Head, HeadLoss, counted_targets, log_softmax
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.sampling import draw_from_whole

FEWEST_CANDIDATES = 16  # of each part, when the likeliest tokens of the mixture are looked for
MORE_CANDIDATES = 4  # times as many where those do not settle it
WHOLE_SHARE = 0.1  # of V: with more candidates than this a row is computed as a whole


class MixtureHead(Head):
    """``parts``, two or more folded heads of one vocabulary, with the weights w = softmax(A h + a).

    A [K, D] and a start as 0: all parts weigh the same. Training keeps nothing of N x V, S or G, but computes each
    part twice, since a row's gradient depends on what all parts say of it. Raises UserError for fewer than two parts,
    or for parts that differ in sizes.
    """

    def __init__(self, parts: Sequence[FoldedHead]) -> None:
        if len(parts) < 2:
            raise UserError(f"head.mixture names {len(parts)} orders: choose two or more, or head.type=folded")
        sizes = {(part.hidden_size, part.vocabulary_size) for part in parts}
        if len(sizes) > 1:
            raise UserError(f"the heads of a mixture have different sizes {sorted(sizes)}: make them alike")
        super().__init__(parts[0].hidden_size, parts[0].vocabulary_size)
        self.parts = nn.ModuleList(parts)
        self.mix = nn.Linear(self.hidden_size, len(parts))
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    @property
    def heads(self) -> list[FoldedHead]:
        """The parts, by their type."""
        return [part for part in self.parts if isinstance(part, FoldedHead)]

    @property
    def capturable(self) -> bool:
        """See Head.capturable."""
        return all(part.capturable for part in self.heads)

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """See Head.start_from_counts."""
        for part in self.heads:
            part.start_from_counts(counts)

    def log_weights(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> log w [N, K]."""
        return log_softmax(self.mix(hidden))

    def _mixed(self, hidden: Tensor, by_part: list[Tensor]) -> Tensor:
        """``by_part``: log P_k [N, C] of each part -> log P [N, C]."""
        return (torch.stack(by_part) + self.log_weights(hidden).t().unsqueeze(-1)).logsumexp(dim=0)

    def prepare_to_decode(self) -> None:
        """See Head.prepare_to_decode."""
        for part in self.heads:
            part.prepare_to_decode()

    def loss(self, hidden: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """See Head.loss. Without parts: neither group nor slot of a token is one and the same in all partitions."""
        _, num_targets = counted_targets(targets)
        total = self.target_log_prob(hidden, targets).sum()
        return HeadLoss(-total / num_targets.clamp(min=1), num_targets)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """See Head.log_prob."""
        return self._mixed(hidden, [part.log_prob(hidden) for part in self.heads])

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See Head.target_log_prob."""
        counted, _ = counted_targets(targets)
        by_part = [part.target_log_prob(hidden, targets).unsqueeze(-1) for part in self.heads]
        return torch.where(counted, self._mixed(hidden, by_part).squeeze(-1), 0.0)

    def _log_prob_and_normalisers(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        both = [part._log_prob_and_normalisers(hidden, targets) for part in self.heads]
        log_prob = self._mixed(hidden, [of_part.unsqueeze(-1) for of_part, _ in both]).squeeze(-1)
        return log_prob, [normaliser for _, normalisers in both for normaliser in normalisers]

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See Head.topk. Exact: where each part names its m likeliest tokens, no other token has more than the sum
        over the parts of w_k times what the part gives to its m-th. As soon as the k-th best of the tokens named has
        as much, it is settled; otherwise more are named, and where that does not pay the row is computed as a whole."""
        self.check_k(k)
        values = hidden.new_empty(len(hidden), k, dtype=self.log_weights(hidden[:0]).dtype)
        tokens = torch.empty(values.shape, dtype=torch.int64, device=hidden.device)
        rows = torch.arange(len(hidden), device=hidden.device)
        width = max(FEWEST_CANDIDATES, 2 * k)
        while len(rows) > 0 and width * len(self.parts) <= WHOLE_SHARE * self.vocabulary_size:
            some = hidden[rows]
            found = [part.topk(some, width) for part in self.heads]
            candidates = torch.cat([ids for _, ids in found], dim=-1).sort(dim=-1).values
            log_prob = self._mixed(some, [part.tokens_log_prob(some, candidates) for part in self.heads])
            repeated = torch.zeros_like(candidates, dtype=torch.bool)
            repeated[:, 1:] = candidates[:, 1:] == candidates[:, :-1]
            best = log_prob.masked_fill(repeated, -torch.inf).topk(k, dim=-1)
            bound = self._mixed(some, [of_part[:, -1:] for of_part, _ in found])
            settled = best.values[:, -1] >= bound.squeeze(-1)
            values[rows[settled]] = best.values[settled]
            tokens[rows[settled]] = candidates.gather(-1, best.indices)[settled]
            rows, width = rows[~settled], MORE_CANDIDATES * width
        for part in self._whole(rows):
            best = self.log_prob(hidden[part]).topk(k, dim=-1)
            values[part], tokens[part] = best.values, best.indices
        return values, tokens

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See Head.sample. A part is drawn and then a token from it, where the distribution is taken as it is; with
        ``top_k`` through ``topk``; tempered or cut to a nucleus it is computed as a whole, a few rows at a time."""
        self.check_sampling(temperature, top_k, top_p)
        if temperature == 0 or top_k is not None:
            return super().sample(hidden, temperature, top_k, top_p, generator)
        tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        if temperature == 1 and (top_p is None or top_p == 1):
            chosen = torch.multinomial(self.log_weights(hidden).exp(), 1, generator=generator).squeeze(-1)
            for index, part in enumerate(self.heads):
                rows = (chosen == index).nonzero().squeeze(-1)
                tokens[rows] = part.sample(hidden[rows], generator=generator)
            return tokens
        for rows in self._whole(torch.arange(len(hidden), device=hidden.device)):
            tokens[rows] = draw_from_whole(self.log_prob(hidden[rows]), temperature, top_p, generator)
        return tokens

    def _whole(self, rows: Tensor) -> tuple[Tensor, ...]:
        """``rows`` in parts whose log-probabilities may be held at once."""
        step = max(1, visiting.WHOLE_ROWS_ELEMENTS // (len(self.parts) * self.vocabulary_size))
        return rows.split(step) if len(rows) > 0 else ()
