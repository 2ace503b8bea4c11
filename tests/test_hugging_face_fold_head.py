"""The folded head of finished models: what it says of tokens, by hand in float64, and how its groups' scores learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from head_cases import HIDDEN_SIZE, LAYOUTS, Layout, make_head, make_hidden
from vocabfold.errors import UserError
from vocabfold.heads import FullHead, LossOptions, SortedLinearScorer, equal_partition
from vocabfold.hugging_face.distil import distil, group_divergence
from vocabfold.hugging_face.fold import copy_rows
from vocabfold.hugging_face.fold_head import RescoredHead

KINDS = {"linear": (0, 0), "network": (5, 0), "visits": (0, 2), "network and visits": (5, 1)}


def head_of(layout: Layout, width: int = 0, visited: int = 0, tied: bool = True) -> tuple[RescoredHead, FullHead]:
    """A head with the rows of a full softmax, and that."""
    full, _ = make_head("full_tied", layout)
    assert isinstance(full, FullHead)
    partition = equal_partition(layout.vocabulary_size, layout.group_size, layout.order(), layout.shortlist)
    scorer = SortedLinearScorer(HIDDEN_SIZE, partition, full.weight if tied else None)
    head = RescoredHead(HIDDEN_SIZE, partition, scorer, width, min(visited, len(partition.multi_groups))).double()
    copy_rows(head, full)
    if head.out is not None:
        nn.init.normal_(head.out)
    return head, full


def log_prob_by_hand(head: RescoredHead, full: FullHead, hidden: Tensor) -> Tensor:
    """Group by group and row by row: [N, V]."""
    partition, result = head.partition, torch.zeros(len(hidden), full.vocabulary_size).double()
    multi = partition.multi_groups.tolist()
    bias = torch.zeros(full.vocabulary_size).double().index_put((partition.multi_tokens,), head.scorer.bias)
    tokens = [partition.order[a:b] for a, b in partition.boundaries.unfold(0, 2, 1).tolist()]
    for row, state in enumerate(hidden):
        scores = head.group_weight @ state + head.group_bias
        if head.into is not None and head.out is not None:
            normed = (state - state.mean()) / (state.var(unbiased=False) + 1e-5).sqrt()
            scores[multi] = scores[multi] + head.out @ nn.functional.gelu(head.into(normed))
        logits = full.weight @ state + bias
        best = sorted(multi, key=lambda group: -float(scores[group].detach()))[: head.visited]
        exact = {group: logits[tokens[group]].exp().sum() for group in best}
        scores = scores.clone()
        if best:
            shift = (sum(exact.values()) / scores[best].exp().sum()).log()
            scores[multi] = scores[multi] + shift
        for group, total in exact.items():
            scores[group] = total.log()
        groups = scores - scores.exp().sum().log()
        for group, those in enumerate(tokens):
            result[row, those] = groups[group] + logits[those] - logits[those].exp().sum().log()
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_answer_is_the_one_by_hand(layout: Layout, kind: str) -> None:
    head, full = head_of(layout, *KINDS[kind])
    hidden = make_hidden(7).requires_grad_()
    expected = log_prob_by_hand(head, full, hidden)
    torch.testing.assert_close(head.log_prob(hidden), expected, rtol=1e-9, atol=1e-9)
    targets = torch.randint(layout.vocabulary_size, (7,), generator=torch.Generator().manual_seed(2))
    targets[3] = -100
    counted = targets != -100
    chosen = expected[counted].gather(-1, targets[counted].unsqueeze(-1)).squeeze(-1)
    result = head.loss(hidden, targets, with_accuracy=True)
    torch.testing.assert_close(result.loss, -chosen.mean(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head.target_log_prob(hidden, targets)[counted], chosen, rtol=1e-9, atol=1e-9)
    inputs = [hidden, *head.parameters()]
    for loss in (result.loss, -head.target_log_prob(hidden, targets).sum() / counted.sum()):
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        by_hand = torch.autograd.grad(-chosen.mean(), inputs, retain_graph=True, allow_unused=True)
        for tensor, one, other in zip(inputs, gradients, by_hand, strict=True):
            one, other = (torch.zeros_like(tensor) if each is None else each for each in (one, other))
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    best = expected.topk(2, dim=-1)
    values, tokens = head.topk(hidden.detach(), 2)
    torch.testing.assert_close(values, best.values, rtol=1e-9, atol=1e-9)
    assert torch.equal(tokens, best.indices)
    torch.testing.assert_close(head.entropy(hidden), -(expected.exp() * expected).sum(-1), rtol=1e-9, atol=1e-9)
    plain = head.loss_with(hidden, targets, LossOptions(), with_accuracy=True)
    torch.testing.assert_close(plain.loss, -chosen.mean(), rtol=1e-9, atol=1e-9)
    smoothed = head.loss_with(hidden, targets, LossOptions(z_loss=0.1, label_smoothing=0.2))
    assert bool(smoothed.loss.isfinite())
    if len(head.partition.multi_groups) == 0:  # one softmax, whose normaliser is that of the full softmax
        square = (full.weight @ hidden.t()).logsumexp(0)[counted].square().mean()
        torch.testing.assert_close(smoothed.parts["z_loss"], square, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_with_every_group_visited_nothing_is_lost(layout: Layout, tied: bool) -> None:
    head, full = head_of(layout, visited=10**9, tied=tied)
    hidden = make_hidden(7)
    torch.testing.assert_close(head.log_prob(hidden), full.log_prob(hidden), rtol=1e-9, atol=1e-9)
    assert group_divergence(head, hidden) == pytest.approx(0, abs=1e-6)
    every = torch.arange(len(head.partition.multi_groups)).expand(7, -1)
    torch.testing.assert_close(head.exact_scores(hidden, every), head.teacher_scores(hidden))


@pytest.mark.parametrize("width", [0, 5])
@pytest.mark.parametrize("layout", [LAYOUTS["prime"], LAYOUTS["shortlist"]], ids=["prime", "shortlist"])
def test_the_scores_learn_and_the_rows_stay(layout: Layout, width: int) -> None:
    head, full = head_of(layout, width)
    if head.out is not None:
        nn.init.zeros_(head.out)
    hidden, other = (2 * make_hidden(2000, seed) + 1 for seed in (3, 4))
    before, singles = group_divergence(head, other), head.partition.single_groups
    rows = head.group_weight[singles].detach().clone()
    reported = distil(head, hidden, steps=150, learning_rate=0.1)
    after = group_divergence(head, other)
    assert after < 0.7 * before
    assert reported == pytest.approx(after, rel=0.3)
    assert torch.equal(head.group_weight[singles], rows)
    torch.testing.assert_close(head.group_weight[singles], full.weight[head.partition.order[: layout.shortlist]])
    lost = head.loss(other, torch.zeros(2000, dtype=torch.long)).loss  # still a head
    assert bool(lost.isfinite())
    again, _ = head_of(layout, width)
    if again.out is not None and again.into is not None and head.into is not None:
        nn.init.zeros_(again.out)
    assert distil(again, hidden, again.teacher_scores(hidden), steps=150, learning_rate=0.1) < before
    visits = [group_divergence(_with_visits(head, number), other) for number in (0, 2, 4)]
    assert visits[0] > visits[1] > visits[2]
    one = group_divergence(_with_visits(head, 1), other)  # on its own it says how high scores are, which softmax drops
    assert one < visits[0] if layout.shortlist else one == pytest.approx(visits[0])


def _with_visits(head: RescoredHead, number: int) -> RescoredHead:
    head.visited = number
    return head


def test_a_fit_keeps_its_precision_where_directions_differ() -> None:
    """States with one direction a thousand times as wide as another, as real ones have."""
    head, _ = head_of(LAYOUTS["prime"])
    scale = torch.logspace(-2, 1, HIDDEN_SIZE).double()
    hidden, other = (make_hidden(2000, seed) * scale for seed in (3, 4))
    before = group_divergence(head, other)
    distil(head, hidden, steps=150, learning_rate=0.1)
    assert group_divergence(head, other) < 0.9 * before


def test_what_cannot_be_fitted_is_one_line_and_one_group_needs_none() -> None:
    head, _ = head_of(LAYOUTS["prime"])
    with pytest.raises(UserError, match="no hidden states"):
        distil(head, make_hidden(0))
    for name in ("one_group", "one_slot"):
        head, _ = head_of(LAYOUTS[name])
        assert distil(head, make_hidden(3)) == 0
    assert group_divergence(head, make_hidden(0)) == 0


def test_rows_read_a_token_are_counted() -> None:
    layout = Layout(50, 10, shortlist=10)  # 10 tokens alone, 4 groups of 10
    assert head_of(layout)[0].rows_a_token == 14 + 10
    assert head_of(layout, visited=3)[0].rows_a_token == 14 + 30
    assert head_of(layout, width=12)[0].rows_a_token == 14 + 12 + 4 * 12 / HIDDEN_SIZE + 10
