"""The groups' scores of a folded head learn from the full softmax whose rows the head keeps, on hidden states.

The loss is KL(P(g|h) of the full softmax || P(g|h) of the head) in nats a token, which is all that folding costs. The
tokens' rows stay as they are, and so do groups of one token, which are exact. The linear part learns in coordinates in
which the hidden states have unit covariance: their own differ by orders of magnitude, which makes any step too long in
some directions and too short in others.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.base import log_softmax
from vocabfold.hugging_face.fold_head import RescoredHead

BATCH_ROWS = 512
STEPS = 700
LEARNING_RATE = 1e-2
SMALLEST_VARIANCE = 1e-4  # of the largest: directions in which the states hardly vary are not blown up


@torch.no_grad()
def group_divergence(head: RescoredHead, hidden: Tensor) -> float:
    """The mean KL in nats on ``hidden`` [N, D], the visited groups of ``head`` scored exactly."""
    total = 0.0
    for some in hidden.split(BATCH_ROWS):
        target = log_softmax(with_exact(head, head.scores(some), head.teacher_scores(some)))
        total += float(F.kl_div(head.group_log_prob(some), target, reduction="sum", log_target=True))
    return total / max(1, len(hidden))


def with_exact(head: RescoredHead, scores: Tensor, teacher: Tensor) -> Tensor:
    """``scores`` [N, G] with ``teacher`` [N, M] in the place of those of groups of more than one token, others being
    exact: log P(g|h) of the full softmax but for a constant a row."""
    return scores.to(teacher.dtype).index_copy(-1, head.partition.multi_groups, teacher)


def distil(
    head: RescoredHead,
    hidden: Tensor,
    teacher: Tensor | None = None,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> float:
    """Fit the groups' scores of ``head``, in place, to ``hidden`` [N, D]; the mean KL of the last tenth of the steps.

    ``teacher`` [N, M]: ``head.teacher_scores(hidden)`` where it is known already. A step takes BATCH_ROWS states, in
    random order, through all before any comes again. Adam, the learning rate falling to 0 along a cosine. Visits take
    no part: the scores are fitted as they are without. Raises UserError without states.
    """
    if len(hidden) == 0:
        raise UserError("no hidden states to learn the groups' scores from: give a few thousand tokens of text")
    partition = head.partition
    multi = partition.multi_groups
    if len(multi) == 0 or partition.num_groups == 1:
        return 0.0
    assert head.group_bias is not None
    if teacher is None:
        teacher = head.teacher_scores(hidden)
    hidden = hidden.detach()
    mean, whitening = _whitening(hidden.float())
    weight = nn.Parameter(mean.new_zeros(len(multi), hidden.shape[1]))
    bias = nn.Parameter(mean.new_zeros(len(multi)))
    network = [] if head.into is None or head.out is None else [*head.into.parameters(), head.out]
    learned = [weight, bias, *network]
    optimizer = torch.optim.Adam(learned, lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for rows in islice(_batches(len(hidden), seed), steps):
        some = hidden[rows]
        with torch.set_grad_enabled(bool(network)):
            base = head.scores(some).float()
        with torch.enable_grad():
            change = F.linear((some.float() - mean) @ whitening, weight, bias)
            log_prob = log_softmax(base.index_add(-1, multi, change))
            target = log_softmax(with_exact(head, base.detach(), teacher[rows].float()))
            loss = F.kl_div(log_prob, target, reduction="sum", log_target=True) / len(rows)
        for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    with torch.no_grad():
        matrix = weight @ whitening.t()
        head.group_weight.index_add_(0, multi, matrix.to(head.group_weight.dtype))
        head.group_bias.index_add_(0, multi, (bias - matrix @ mean).to(head.group_bias.dtype))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _batches(number: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(number, generator=generator).split(BATCH_ROWS)


@torch.no_grad()
def _whitening(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(the mean state [D], the matrix [D, D] that gives states less their mean unit covariance)."""
    mean = hidden.mean(dim=0)
    centred = (hidden - mean).double()
    variances, directions = torch.linalg.eigh(centred.t() @ centred / len(hidden))
    variances = variances.clamp(min=float(variances[-1]) * SMALLEST_VARIANCE + 1e-12)
    return mean, (directions / variances.sqrt()).to(hidden.dtype)
