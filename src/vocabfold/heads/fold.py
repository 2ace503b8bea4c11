"""A trained full softmax becomes a folded head: its rows score the tokens, its own group probabilities the groups.

The teacher's P(v|h) = softmax(W h)_v is P(g|h) P(t|g, h) with P(t|g, h) = softmax of W h over the tokens of group g,
which a linear token scorer with the teacher's rows repeats exactly, and P(g|h) = softmax over the groups of
z_g(h) = logsumexp of W h over the tokens of g. A group scorer is linear in h and z_g is not, but for groups of one
token: here lies all that folding loses. ``fold`` fits it in closed form, ``distillation_loss`` learns it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vocabfold.errors import UserError
from vocabfold.heads.base import log_softmax
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead
from vocabfold.heads.gradients_in_forward import CHUNK_ELEMENTS, FEWEST_ROWS, chunks
from vocabfold.heads.linear import SortedLinearScorer
from vocabfold.heads.partition import Partition

CHUNK_TOKENS = CHUNK_ELEMENTS // FEWEST_ROWS
PRIOR_ROWS = 1.0  # how many hidden states the linearised group logits weigh against those that are fitted
LEAST_SHARE = 1e-12  # added to each token's mean probability: tokens never expected count alike within their group


def fold(head: FullHead, partition: Partition, hidden: Tensor | None = None, tied: bool = True) -> FoldedHead:
    """``head`` on a ``partition`` of its vocabulary: P(t|g, h) exactly the teacher's, P(g|h) fitted to the teacher's.

    ``hidden`` [N, D], a few thousand hidden states of the teacher's text, fit the groups: see ``fitted_group_weight``.
    None takes each group's mean row, the slope of z_g at h = 0, which knows neither the text nor the sizes of groups.
    ``tied`` shares the teacher's rows (the input embedding's where the teacher is tied); False copies them.
    Raises UserError where the partition is of another vocabulary or ``hidden`` holds no row.
    """
    if partition.vocabulary_size != head.vocabulary_size:
        raise UserError(
            f"the partition is of {partition.vocabulary_size} tokens, the head has {head.vocabulary_size}: "
            "make one for this vocabulary"
        )
    scorer = SortedLinearScorer(head.hidden_size, partition, head.weight if tied else None)
    folded = FoldedHead(head.hidden_size, partition, scorer).to(head.weight)
    with torch.no_grad():
        if not tied:
            scorer.weight.copy_(head.weight[partition.multi_tokens])
        if hidden is None:
            shares = 1 / partition.sizes.to(head.weight.dtype)
            folded.group_weight.copy_(_mixed_rows(head, partition, shares[partition.group_of]))
        else:
            folded.group_weight.copy_(fitted_group_weight(head, partition, hidden))
    return folded


@torch.no_grad()
def group_logits(head: FullHead, partition: Partition, hidden: Tensor) -> Tensor:
    """z [N, G], the logsumexp of the teacher's logits over each group's tokens, for ``hidden`` [N, D].

    Its log_softmax is the teacher's exact log P(g|h). Logits [N, V] never exist: a block of them at a time, which a
    CPU's cache holds.
    """
    result = hidden.new_empty(len(hidden), partition.num_groups, dtype=torch.promote_types(hidden.dtype, torch.float32))
    # Groups of one size form a rectangle: no padding.
    for size in partition.sizes.unique().tolist():
        for groups in (partition.sizes == size).nonzero().squeeze(-1).split(max(1, CHUNK_TOKENS // size)):
            positions = partition.boundaries[groups].unsqueeze(-1) + torch.arange(size, device=groups.device)
            rows = head.weight[partition.order[positions].flatten()]
            for part in chunks(len(hidden), len(rows)):
                logits = F.linear(hidden[part], rows).to(result.dtype)
                result[part, groups] = logits.view(-1, len(groups), size).logsumexp(dim=-1)
    return result


@torch.no_grad()
def fitted_group_weight(head: FullHead, partition: Partition, hidden: Tensor) -> Tensor:
    """W_group [G, D] of a bias-free group scorer that is near the teacher's P(g|h) on ``hidden`` [N, D]: closed form.

    Row g minimises sum_n P(g|h_n) (w . h_n - z_g(h_n))^2 + PRIOR_ROWS mean|h|^2 / D |w - w0_g|^2. To second order KL is
    half the variance over groups of the error of the logits, which such squares bound. w0_g makes z_g linear: the
    group's rows mixed by their mean probability within it, and a constant through the direction a in which a . h is 1
    on all rows, as far as there is one (a final LayerNorm with a bias has one exactly). A group of one token is exact.
    """
    if len(hidden) == 0:
        raise UserError("no hidden states to fit the groups on: give a few thousand rows, or None")
    target = group_logits(head, partition, hidden)
    normalizer = target.logsumexp(dim=-1, keepdim=True)
    probability = (target - normalizer).exp().double()
    mass = head.weight.new_zeros(head.vocabulary_size, dtype=torch.float64)
    for part in chunks(len(hidden), head.vocabulary_size):
        mass += (head.logits(hidden[part]) - normalizer[part]).exp().sum(0)
    mass = mass / len(hidden) + LEAST_SHARE
    group_mass = mass.new_zeros(partition.num_groups).index_add_(0, partition.group_of, mass)
    start = _mixed_rows(head, partition, (mass / group_mass[partition.group_of]).to(head.weight.dtype)).double()

    rows = hidden.double()
    prior = PRIOR_ROWS * rows.square().mean() * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    constant = torch.linalg.solve(rows.t() @ rows + prior, rows.sum(0))
    error = target.double() - rows @ start.t()
    # A group that the text never asks for has no weight to divide by, and keeps its slope alone.
    offset = (probability * error).sum(0) / probability.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    error -= offset * (rows @ constant).unsqueeze(-1)
    start += offset.unsqueeze(-1) * constant
    for group in partition.multi_groups.tolist():
        weighted = rows * probability[:, group, None]
        start[group] += torch.linalg.solve(weighted.t() @ rows + prior, weighted.t() @ error[:, group])
    return start


def distillation_loss(folded: FoldedHead, hidden: Tensor, teacher_logits: Tensor) -> Tensor:
    """The mean over rows of KL(teacher's P(g|h) || P(g|h)) in nats: what folding costs, since the rest is exact.

    ``hidden`` [N, D], ``teacher_logits`` [N, G] from ``group_logits``. Only ``group_weight`` gets a gradient from it
    (and ``hidden``, where it wants one); 0 for an empty batch.
    """
    target = log_softmax(teacher_logits)
    total = F.kl_div(folded.group_log_prob(hidden), target, reduction="sum", log_target=True)
    return total / max(1, len(hidden))


def _mixed_rows(head: FullHead, partition: Partition, shares: Tensor) -> Tensor:
    """[G, D]: the teacher's rows of each group in the proportion ``shares`` [V]."""
    result = head.weight.new_zeros(partition.num_groups, head.hidden_size)
    return result.index_add_(0, partition.group_of, head.weight * shares.unsqueeze(-1))
