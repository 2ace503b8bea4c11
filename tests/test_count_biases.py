"""Biases that start from a text's counts, and the scorer that sees the group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from head_cases import HIDDEN_SIZE, LAYOUTS, Layout, make_head, make_hidden
from vocabfold.errors import UserError
from vocabfold.heads import (
    ConditionedLinearScorer,
    FoldedHead,
    FullHead,
    HeadSettings,
    SortedLinearScorer,
    build_head,
    equal_partition,
)
from vocabfold.heads.conditioned import ConditionOptions
from vocabfold.heads.fold import fold, group_logits
from vocabfold.heads.readers import GroupReader, ResidualReader, WideReader
from vocabfold.heads.settings import PartitionSettings

COUNTS = torch.tensor([5, 0, 17, 1, 1, 900, 3, 0, 40, 2, 2])


@pytest.mark.parametrize("layout", [LAYOUTS["one_slot"], Layout(11, 4, shuffled=True), Layout(11, 3, True, 2)])
@pytest.mark.parametrize("kind", ["full_bias_free", "sorted_free_bias", "scale_shift_bias"])
def test_at_first_a_hidden_state_of_zeros_gives_the_unigram_distribution(kind: str, layout: Layout) -> None:
    head, _ = make_head(kind, layout)
    head.start_from_counts(COUNTS)
    expected = (COUNTS + 1).double() / (COUNTS + 1).sum()
    found = head.log_prob(torch.zeros(1, HIDDEN_SIZE, dtype=torch.float64)).exp()[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["full", "folded"])
def test_settings_ask_for_them_and_weights_bring_them(name: str) -> None:
    settings = HeadSettings(type=name, tied=False, count_biases=True, scorer="linear_conditioned", condition_width=3)
    settings.partition = PartitionSettings(group_size=4)
    embedding = nn.Embedding(11, HIDDEN_SIZE)
    built = build_head(settings, 11, embedding, counts=COUNTS)
    loaded = build_head(settings, 11, embedding)
    zeros = torch.zeros(1, HIDDEN_SIZE)
    assert not torch.allclose(built.log_prob(zeros), loaded.log_prob(zeros))
    loaded.load_state_dict(built.state_dict())
    assert torch.equal(built.log_prob(zeros), loaded.log_prob(zeros))


@pytest.mark.parametrize("kind", ["full_free", "sorted_free", "chunked_free", "adaptive"])
def test_a_head_without_biases_says_so(kind: str) -> None:
    head, _ = make_head(kind, Layout(40, 5))
    with pytest.raises(UserError, match=r"head\.count_biases=false"):
        head.start_from_counts(torch.ones(40))


def test_a_conditioned_scorer_starts_as_a_linear_one_and_then_sees_the_group() -> None:
    partition = equal_partition(30, 6, shortlist=2)
    torch.manual_seed(0)
    linear = FoldedHead(HIDDEN_SIZE, partition, SortedLinearScorer(HIDDEN_SIZE, partition)).double()
    conditioned = FoldedHead(HIDDEN_SIZE, partition, ConditionedLinearScorer(HIDDEN_SIZE, partition)).double()
    conditioned.load_state_dict(linear.state_dict(), strict=False)
    hidden = make_hidden(5)
    assert torch.equal(linear.log_prob(hidden), conditioned.log_prob(hidden))
    scorer = conditioned.scorer
    assert isinstance(scorer, ConditionedLinearScorer)
    nn.init.normal_(scorer.out)
    seen = scorer.condition(hidden.unsqueeze(1), torch.tensor([[2, 3]]))
    assert seen.shape == (5, 2, HIDDEN_SIZE) and not torch.allclose(seen[:, 0], seen[:, 1])
    with pytest.raises(UserError, match=r"head\.condition_width is 0"):
        ConditionedLinearScorer(HIDDEN_SIZE, partition, 0)


def test_a_teacher_with_biases_is_folded_with_them() -> None:
    torch.manual_seed(0)
    teacher = FullHead(HIDDEN_SIZE, 40, init_std=0.7, with_bias=True).double()
    assert teacher.bias is not None
    nn.init.normal_(teacher.bias)
    hidden = make_hidden(7)
    for partition in (equal_partition(40, 1), equal_partition(40, 40)):  # where nothing is lost
        torch.testing.assert_close(fold(teacher, partition, hidden).log_prob(hidden), teacher.log_prob(hidden))
    partition = equal_partition(40, 6)
    expected = teacher.log_prob(hidden)[:, partition.order].split(partition.sizes.tolist(), dim=1)
    exact = torch.stack([part.logsumexp(dim=1) for part in expected], dim=1)
    torch.testing.assert_close(group_logits(teacher, partition, hidden).log_softmax(dim=1), exact)


def test_a_detached_network_leaves_the_hidden_states_the_gradient_of_a_linear_scorer() -> None:
    """Its own parameters learn as ever; h_g reaches h through the residual path alone."""
    partition = equal_partition(30, 6)
    torch.manual_seed(0)
    heads = [
        FoldedHead(HIDDEN_SIZE, partition, ConditionedLinearScorer(HIDDEN_SIZE, partition, options=options)).double()
        for options in (ConditionOptions(), ConditionOptions(detached=True))
    ]
    for parameter in heads[0].parameters():
        nn.init.normal_(parameter, std=0.5)
    heads[1].load_state_dict(heads[0].state_dict())
    hidden, targets = make_hidden(7).requires_grad_(), torch.arange(7) * 4
    losses = [head.loss(hidden, targets).loss for head in heads]
    torch.testing.assert_close(losses[0], losses[1])
    scorers = [head.scorer for head in heads]
    assert all(isinstance(scorer, ConditionedLinearScorer) for scorer in scorers)
    whole, detached = (
        torch.autograd.grad(loss, [hidden, *scorer.parameters()]) for loss, scorer in zip(losses, scorers, strict=True)
    )
    torch.testing.assert_close(whole[1:], detached[1:])
    assert not torch.allclose(whole[0], detached[0])
    scorer = heads[0].scorer
    assert isinstance(scorer, ConditionedLinearScorer)
    groups = partition.group_of[targets]
    seen = scorer.condition(hidden.detach(), groups).requires_grad_()
    token_loss = (
        -super(ConditionedLinearScorer, scorer).target_log_prob(seen, groups, partition.slot_of[targets]).mean()
    )
    group_loss = -heads[0].group_log_prob(hidden).gather(1, groups[:, None]).mean()
    expected = torch.autograd.grad(token_loss, seen)[0] + torch.autograd.grad(group_loss, hidden)[0]
    torch.testing.assert_close(detached[0], expected)


@pytest.mark.parametrize("reader", [ResidualReader, WideReader])
def test_a_reader_changes_nothing_at_first(reader: type[GroupReader]) -> None:
    partition, scorer_std = equal_partition(30, 6), 0.5
    heads = []
    for group_reader in (None, reader(HIDDEN_SIZE)):
        torch.manual_seed(0)
        scorer = SortedLinearScorer(HIDDEN_SIZE, partition, init_std=scorer_std)
        heads.append(FoldedHead(HIDDEN_SIZE, partition, scorer, group_reader=group_reader).double())
    hidden = make_hidden(5)
    torch.testing.assert_close(heads[0].log_prob(hidden), heads[1].log_prob(hidden))
