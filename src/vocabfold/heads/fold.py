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
from vocabfold.heads.base import Head, log_softmax
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead
from vocabfold.heads.kernels import CHUNK_ELEMENTS, FEWEST_ROWS, chunks
from vocabfold.heads.linear import SortedLinearScorer
from vocabfold.heads.partition import Partition

CHUNK_TOKENS = CHUNK_ELEMENTS // FEWEST_ROWS
PRIOR_ROWS = 1e-4  # how many hidden states of a certain group its mean row weighs against those that are fitted


def foldable(head: Head, name: object) -> FullHead:
    """``head``, which has to be a full softmax; ``name`` is what it belongs to. Raises UserError for any other."""
    if not isinstance(head, FullHead):
        raise UserError(f"{name} has no full softmax to fold: name a run that was trained with head=full")
    return head


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
    folded = FoldedHead(head.hidden_size, partition, scorer, with_bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        if head.bias is not None and folded.group_bias is not None:
            scorer.bias.copy_(head.bias[partition.multi_tokens])
            folded.group_bias.copy_(_group_bias(head, partition))
        if not tied:
            scorer.weight.copy_(head.weight[partition.multi_tokens])
        if hidden is None:
            folded.group_weight.copy_(_mean_rows(head, partition))
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
            tokens = partition.order[positions].flatten()
            rows, bias = head.weight[tokens], None if head.bias is None else head.bias[tokens]
            for part in chunks(len(hidden), len(rows)):
                logits = F.linear(hidden[part], rows, bias).to(result.dtype)
                result[part, groups] = logits.view(-1, len(groups), size).logsumexp(dim=-1)
    return result


@torch.no_grad()
def fitted_group_weight(head: FullHead, partition: Partition, hidden: Tensor) -> Tensor:
    """W_group [G, D] that is near the teacher's P(g|h) on ``hidden`` [N, D], in closed form: row w of group g minimises

    sum_n P(g|h_n) (w . h_n + b_g - z_g(h_n))^2 + PRIOR_ROWS * mean |h|^2 / D * |w - mean row of g|^2

    To second order KL is half the variance over the groups of their logits' errors, under P(g|h): these squares bound
    it, where equal weights would spend the fit on groups that nobody expects. b_g is z_g(0), less the log of the
    group's size, of a teacher with a bias, else 0: the group scorer needs none after a LayerNorm with one, whose
    hidden states agree in one direction. A group of one token is exact.
    """
    if len(hidden) == 0:
        raise UserError("no hidden states to fit the groups on: give a few thousand rows, or None")
    target = group_logits(head, partition, hidden).double()
    probability = target.softmax(dim=-1)
    rows, weight = hidden.double(), _mean_rows(head, partition).double()
    error = target - rows @ weight.t() - _group_bias(head, partition)
    prior = PRIOR_ROWS * rows.square().mean() * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    for group in partition.multi_groups.tolist():
        weighted = rows * probability[:, group, None]
        weight[group] += torch.linalg.solve(weighted.t() @ rows + prior, weighted.t() @ error[:, group])
    return weight


def distillation_loss(folded: FoldedHead, hidden: Tensor, teacher_logits: Tensor) -> Tensor:
    """The mean over rows of KL(teacher's P(g|h) || P(g|h)) in nats: what folding costs, since the rest is exact.

    ``hidden`` [N, D], ``teacher_logits`` [N, G] from ``group_logits``. Only ``group_weight`` gets a gradient from it
    (and ``hidden``, where it wants one); 0 for an empty batch.
    """
    target = log_softmax(teacher_logits)
    total = F.kl_div(folded.group_log_prob(hidden), target, reduction="sum", log_target=True)
    return total / max(1, len(hidden))


def _mean_rows(head: FullHead, partition: Partition) -> Tensor:
    """[G, D]: the mean of the teacher's rows of each group."""
    sums = head.weight.new_zeros(partition.num_groups, head.hidden_size)
    return sums.index_add_(0, partition.group_of, head.weight) / partition.sizes.unsqueeze(-1)


def _group_bias(head: FullHead, partition: Partition) -> Tensor:
    """[G]: the log of the mean of exp(bias) over the tokens of each group, 0 without a bias; float64."""
    sums = torch.zeros(partition.num_groups, dtype=torch.float64, device=head.weight.device)
    if head.bias is None:
        return sums
    return (sums.index_add_(0, partition.group_of, head.bias.double().exp()) / partition.sizes).log()
