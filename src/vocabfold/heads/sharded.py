"""Heads larger than one process: the rows of the vocabulary lie spread over the processes of a run.

``shard_head`` spreads a full softmax (here) or a folded head (sharded_folded.py). Each process keeps hidden states of
its own, as with data or sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.base import Head, HeadLoss, counted_targets, log_softmax, smoothed_log_frequency
from vocabfold.heads.collectives import Group, gather, numbers_everywhere, on_every_rank, own_part, topk_of_all
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead
from vocabfold.heads.kernels import chunks, product_dtype, sum_dtype
from vocabfold.heads.loss_options import soft_cap
from vocabfold.heads.sharded_folded import ShardedFoldedHead
from vocabfold.tokens import IGNORE_INDEX


def shard_head(head: Head, group: Group = None, counts: Tensor | None = None) -> ShardedFullHead | ShardedFoldedHead:
    """``head``, the same in every process of ``group`` (None: of the whole run), with its rows spread over them.

    Rows are copied, so that a head which borrowed the embedding's has its own. ``counts`` [V]: of the tokens in a
    text, by which groups are given out. Raises UserError for a head that has no rows to spread.
    """
    if isinstance(head, FoldedHead):
        return ShardedFoldedHead(head, group, counts)
    if isinstance(head, FullHead):
        return ShardedFullHead(head, group)
    raise UserError(f"a {type(head).__name__} cannot be spread over processes: use head=full or head=folded")


class ShardedFullHead(Head):
    """FullHead's distribution, process r of R holding the rows floor(V r / R) .. floor(V (r + 1) / R) - 1 of W.

    Cross entropy as in Megatron-LM (arXiv 1909.08053, section 3), with hidden states of each process's own: all of them
    go to every process, which adds its logits to the largest, the sum of exponentials and the target's; nothing of
    N x V is held. Called by all processes at the same time; gradients as in ShardedFoldedHead.
    """

    def __init__(self, whole: FullHead, group: Group = None) -> None:
        super().__init__(whole.hidden_size, whole.vocabulary_size)
        self.group, self.softcap, self.training_options = group, whole.softcap, whole.training_options
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.bounds = [whole.vocabulary_size * part // ranks for part in range(ranks + 1)]
        self.own = slice(self.bounds[rank], self.bounds[rank + 1])
        self.weight = nn.Parameter(whole.weight.detach()[self.own].clone())
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach()[self.own].clone())

    @torch.no_grad()
    def unsharded(self) -> FullHead:
        """The same head in one piece, in every process."""
        with_bias = self.bias is not None
        whole = FullHead(self.hidden_size, self.vocabulary_size, softcap=self.softcap, with_bias=with_bias)
        whole.to(self.weight).training_options = self.training_options
        for target, part in ((whole.weight, self.weight), (whole.bias, self.bias)):
            if target is not None and part is not None:
                target.copy_(self._joined(gather(part, self._width, self.group).unflatten(0, (-1, self._width))))
        return whole

    @property
    def _width(self) -> int:
        """The most tokens that a process has."""
        return max(end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False))

    def _joined(self, parts: Tensor) -> Tensor:
        """``parts`` [R, width, ...] of every process -> [V, ...]."""
        sizes = [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """See Head.start_from_counts."""
        if self.bias is None:
            super().start_from_counts(counts)
        else:
            self.bias.copy_(smoothed_log_frequency(counts)[self.own])

    def _own_logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [M, D] of anybody -> the logits of this process's tokens, in float32 at least."""
        logits = F.linear(hidden, self.weight, self.bias)
        return soft_cap(logits, self.softcap).to(sum_dtype(logits.dtype))

    def _target_logit_and_normaliser(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[N, 2]: the logit of each target (0 where it is ignored) and the log of the sum of all exp(logits)."""
        dtype = product_dtype(hidden)
        most = max(1, *numbers_everywhere(len(hidden), self.group, hidden.device))
        everybody = gather(hidden.to(dtype), most, self.group)
        # Of rows that only fill a part up the target is token 0: nobody reads what comes of them.
        tokens = gather(targets.to(torch.int32), most, self.group).long()
        biases = () if self.bias is None else (self.bias,)
        both = _LogitAndNormaliser.apply(
            tokens - self.own.start, self.softcap, self.group, everybody, self.weight, *biases
        )
        return own_part(both, len(hidden), self.group)

    def _log_prob_and_normalisers(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        if ((targets < 0) & (targets != IGNORE_INDEX) | (targets >= self.vocabulary_size)).any():
            raise IndexError(f"a target is none of the {self.vocabulary_size} tokens")
        both = self._target_logit_and_normaliser(hidden, targets)
        return both[:, 0] - both[:, 1], [both[:, 1]]

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See Head.target_log_prob."""
        log_prob, _ = self._log_prob_and_normalisers(hidden, targets)
        return torch.where(targets != IGNORE_INDEX, log_prob, 0.0)

    def loss(self, hidden: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """See FullHead.loss."""
        _, num_targets = counted_targets(targets)
        parts = {}
        if with_accuracy:
            with torch.no_grad():
                parts["accuracy"] = self.accuracy(hidden, targets)
        total = -self.target_log_prob(hidden, targets).sum()
        return HeadLoss(total / num_targets.clamp(min=1), num_targets, parts)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """See Head.log_prob."""

        def compute(rows: Tensor) -> tuple[Tensor]:
            logits = self._own_logits(rows)
            return (F.pad(logits, (0, self._width - logits.shape[1])),)

        (logits,) = on_every_rank(hidden, compute, self.group)
        return log_softmax(self._joined(logits.transpose(1, 2)).t())

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See Head.topk. Every process looks for the likeliest of its own tokens for everybody."""
        self.check_k(k)
        tokens = torch.arange(self.own.start, self.own.stop, device=hidden.device)
        logits, best = topk_of_all(hidden, k, self._own_logits, tokens, self.group)
        return logits - self._normaliser(hidden).unsqueeze(-1), best

    def _normaliser(self, hidden: Tensor) -> Tensor:
        return self._target_logit_and_normaliser(hidden, torch.zeros(len(hidden), device=hidden.device))[:, 1]

    def entropy(self, hidden: Tensor) -> Tensor:
        """See Head.entropy."""

        def compute(rows: Tensor) -> tuple[Tensor, Tensor]:
            logits = self._own_logits(rows)
            if logits.shape[1] == 0:
                nothing = logits.sum(dim=-1, keepdim=True)
                return nothing - torch.inf, nothing
            mean = (logits.softmax(dim=-1) * logits).sum(dim=-1, keepdim=True)
            return logits.logsumexp(dim=-1, keepdim=True), mean

        normalisers, means = on_every_rank(hidden, compute, self.group)
        share = normalisers.softmax(dim=0)
        return (normalisers.logsumexp(dim=0) - (share * means).sum(dim=0)).squeeze(-1)

    def _mean_log_prob(self, hidden: Tensor, normalisers: list[Tensor]) -> Tensor:
        def compute(rows: Tensor) -> tuple[Tensor]:
            return (self._own_logits(rows).sum(dim=-1, keepdim=True),)

        (parts,) = on_every_rank(hidden, compute, self.group)
        return parts.sum(dim=0).squeeze(-1) / self.vocabulary_size - normalisers[0]


class _LogitAndNormaliser(torch.autograd.Function):
    """[M, 2] of the hidden states of all processes, the same in each of them: see ShardedFullHead. Keeps no logits:
    backward computes them again, a few rows at a time. The gradient of hidden is this process's part of a sum."""

    @staticmethod
    def forward(
        ctx: Any, places: Tensor, softcap: float | None, group: Group, hidden: Tensor, weight: Tensor, *biases: Tensor
    ) -> Tensor:
        ctx.softcap = softcap
        dtype = sum_dtype(hidden.dtype)
        target, normaliser = hidden.new_zeros(len(hidden), dtype=dtype), hidden.new_zeros(len(hidden), dtype=dtype)
        for part in chunks(len(hidden), len(weight)):
            logits = soft_cap(_logits(hidden[part], weight, biases), softcap)
            normaliser[part] = logits.logsumexp(dim=-1)
            is_here, column = _columns(places[part], len(weight))
            if len(weight) > 0:
                target[part] = logits.gather(-1, column).squeeze(-1).where(is_here, 0.0)
        largest = normaliser.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        total = (normaliser - largest).exp()
        dist.all_reduce(total, group=group)
        dist.all_reduce(target, group=group)
        normaliser = largest + total.log()
        ctx.save_for_backward(places, normaliser, hidden, weight, *biases)
        return torch.stack([target, normaliser], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        places, normaliser, hidden, weight, *biases = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype(weight.dtype))
        grad_biases = [torch.zeros_like(bias) for bias in biases]
        for part in chunks(len(hidden) if len(weight) > 0 else 0, len(weight)):
            some = hidden[part]
            plain = _logits(some, weight, biases)
            logits = soft_cap(plain, ctx.softcap)
            slope = (logits - normaliser[part, None]).exp() * gradient[part, 1:]
            is_here, column = _columns(places[part], len(weight))
            slope.scatter_add_(-1, column, gradient[part, :1].where(is_here[:, None], 0.0))
            if ctx.softcap is not None:
                slope *= 1 - (logits / ctx.softcap).square()
            for grad_bias in grad_biases:
                grad_bias += slope.sum(dim=0)
            slope = slope.to(some.dtype)
            grad_hidden[part] = slope @ weight.to(some.dtype)
            grad_weight += (slope.t() @ some).to(grad_weight.dtype)
        return None, None, None, grad_hidden, grad_weight.to(weight.dtype), *grad_biases


def _logits(hidden: Tensor, weight: Tensor, biases: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).t()).to(sum_dtype(hidden.dtype))
    for bias in biases:
        logits += bias
    return logits


def _columns(places: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(whether a place is one of this process's columns [M], which one [M, 1])."""
    is_here = (places >= 0) & (places < number)
    return is_here, places.where(is_here, 0).unsqueeze(-1)
