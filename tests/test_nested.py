"""Three symbols a token: everything that a head promises, against three softmaxes written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from head_cases import HIDDEN_SIZE, LAYOUTS, Layout, make_hidden
from vocabfold.heads import LossOptions, SortedLinearScorer, equal_partition
from vocabfold.heads.nested import NestedFoldedHead
from vocabfold.tokens import IGNORE_INDEX

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def nested(layout: Layout, with_bias: bool = True) -> NestedFoldedHead:
    torch.manual_seed(0)
    partition = equal_partition(layout.vocabulary_size, layout.group_size, layout.order(), layout.shortlist)
    scorer = SortedLinearScorer(HIDDEN_SIZE, partition)
    head = NestedFoldedHead(HIDDEN_SIZE, partition, scorer, with_bias=with_bias).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    return head


def within(scorer: SortedLinearScorer, group: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(log P of the members of a group [N, members], the log normaliser [N]) from the scorer's own rows."""
    index = int(scorer.partition.multi_index[group])
    if index < 0:
        return hidden.new_zeros(len(hidden), 1), hidden.new_zeros(len(hidden))
    start, stop = scorer.partition.multi_bounds[index : index + 2]
    logits = hidden @ scorer.weight[start:stop].t() + scorer.bias[start:stop]
    normaliser = logits.exp().sum(1).log()
    return logits - normaliser[:, None], normaliser


def plain(head: NestedFoldedHead, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(log P [N, V], the squares of the three log normalisers of each token summed [N, V])."""
    outer, scorer = head.groups, head.scorer
    assert isinstance(scorer, SortedLinearScorer) and isinstance(outer.scorer, SortedLinearScorer)
    assert outer.group_bias is not None
    logits = hidden @ outer.group_weight.t() + outer.group_bias
    first = logits.exp().sum(1).log()
    log_prob, squares = hidden.new_empty(2, len(hidden), head.vocabulary_size).unbind(0)
    columns, penalties = [log_prob] * head.vocabulary_size, [squares] * head.vocabulary_size
    for group in range(head.partition.num_groups):
        above, place = int(outer.partition.group_of[group]), int(outer.partition.slot_of[group])
        of_group, second = within(outer.scorer, above, hidden)
        of_token, third = within(scorer, group, hidden)
        for slot in range(int(head.partition.sizes[group])):
            token = int(head.partition.token_at(torch.tensor(group), torch.tensor(slot)))
            columns[token] = logits[:, above] - first + of_group[:, place] + of_token[:, slot]
            penalties[token] = first**2 + second**2 + third**2
    return torch.stack(columns, 1), torch.stack(penalties, 1)


@every_layout
def test_everything_is_that_of_three_softmaxes(layout: Layout) -> None:
    head, hidden = nested(layout), make_hidden(9).requires_grad_()
    targets = torch.arange(9) * 5 % layout.vocabulary_size
    targets[4] = IGNORE_INDEX
    counted = targets != IGNORE_INDEX
    expected, squares = plain(head, hidden)
    log_prob = head.log_prob(hidden)
    torch.testing.assert_close(log_prob, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(9).double(), rtol=1e-12, atol=1e-12)
    rows = torch.arange(9)[counted]
    chosen = expected[rows, targets[counted]]
    inputs = [hidden, *head.parameters()]
    unused: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # a head of one group has no choice
    wanted = torch.autograd.grad(-chosen.mean(), inputs, retain_graph=True, **unused)
    for with_accuracy in (False, True):
        result = head.loss(hidden, targets, with_accuracy)
        torch.testing.assert_close(result.loss, -chosen.mean(), rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(result.loss, inputs, **unused)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    likeliest = head.group_log_prob(hidden).argmax(1)
    hits = likeliest[counted] == head.partition.group_of[targets[counted]]
    assert float(result.parts["group_accuracy"]) == pytest.approx(float(hits.double().mean()))
    each = head.target_log_prob(hidden, targets)
    torch.testing.assert_close(each[counted], chosen, rtol=1e-12, atol=1e-12)
    assert each[4] == 0
    penalised = head.loss_with(hidden, targets, LossOptions(z_loss=0.3)).loss
    penalty = squares[rows, targets[counted]]
    torch.testing.assert_close(penalised, (0.3 * penalty - chosen).mean(), rtol=1e-11, atol=1e-12)
    best = head.topk(hidden, min(5, layout.vocabulary_size))
    reference = expected.topk(min(5, layout.vocabulary_size))
    torch.testing.assert_close(best[0], reference.values, rtol=1e-11, atol=1e-12)
    assert torch.equal(best[1], reference.indices)


@pytest.mark.parametrize("targets", [[IGNORE_INDEX] * 3, []])
def test_without_a_target_the_loss_is_zero(targets: list[int]) -> None:
    head, hidden = nested(LAYOUTS["prime"]), make_hidden(len(targets)).requires_grad_()
    loss = head.loss(hidden, torch.tensor(targets, dtype=torch.int64), True).loss
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(loss, [hidden, *head.parameters()]))


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_samples_follow_the_distribution(top_p: float | None) -> None:
    head, hidden = nested(Layout(29, 3, shuffled=True)), make_hidden(1)
    probability = head.log_prob(hidden)[0].exp().detach()
    if top_p is not None:
        ranked = probability.sort(descending=True)
        kept = ranked.indices[ranked.values.cumsum(0) - ranked.values < top_p]
        probability = torch.zeros_like(probability).index_copy(0, kept, probability[kept])
        probability = probability / probability.sum()
    draws = head.sample(hidden.expand(20_000, -1), top_p=top_p, generator=torch.Generator().manual_seed(3))
    share = torch.bincount(draws, minlength=29) / len(draws)
    assert (share[probability == 0] == 0).all()
    assert float((share - probability).abs().sum()) < 0.03


@every_layout
def test_biases_from_counts_give_the_unigram_distribution(layout: Layout) -> None:
    head = nested(layout)
    counts = torch.arange(layout.vocabulary_size) ** 2 % 17
    head.start_from_counts(counts)
    frequency = (counts + 1).double() / (counts + 1).sum()
    found = head.log_prob(torch.zeros(1, HIDDEN_SIZE, dtype=torch.float64))[0]
    torch.testing.assert_close(found.exp(), frequency, rtol=1e-12, atol=1e-12)
