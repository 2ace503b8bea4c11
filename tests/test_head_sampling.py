"""topk and sample of every head against its whole distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from head_cases import FOLDED_KINDS, KINDS, LAYOUTS, Layout, make_head, make_hidden, one_case_a_kind
from vocabfold.errors import UserError
from vocabfold.heads import FoldedHead
from vocabfold.heads.sampling import draw_from_sorted

NUM_DRAWS = 6_000
SAMPLING: dict[str, dict[str, Any]] = {
    "whole": {},
    "cool": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "all": {"temperature": 1.3, "top_k": 7, "top_p": 0.9},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@one_case_a_kind(LAYOUTS, [0.1, 1.0, 5.0])
def test_topk_is_exact(kind: str, layout: Layout, weight_std: float) -> None:
    head, _ = make_head(kind, layout, weight_std)
    hidden = make_hidden(12)
    log_prob = head.log_prob(hidden)
    for k in {1, min(3, layout.vocabulary_size), layout.vocabulary_size}:
        expected = log_prob.topk(k, dim=-1)
        values, tokens = head.topk(hidden, k)
        torch.testing.assert_close(values, expected.values, rtol=1e-12, atol=1e-12)
        assert torch.equal(tokens, expected.indices)
        empty_values, empty_tokens = head.topk(hidden[:0], k)
        assert empty_values.shape == empty_tokens.shape == (0, k)


class GroupCounter:
    """Stands in for a scorer's group_log_prob and counts the groups that it is asked for."""

    def __init__(self, head: FoldedHead) -> None:
        self.original = head.scorer.group_log_prob
        self.num_groups = 0

    def __call__(self, hidden: Tensor, groups: Tensor) -> Tensor:
        self.num_groups += groups.numel()
        return self.original(hidden, groups)


@pytest.mark.parametrize("kind", FOLDED_KINDS)
def test_topk_leaves_unlikely_groups_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, layout = 16, Layout(401, 5)
    head, _ = make_head(kind, layout, weight_std=0.5)
    assert isinstance(head, FoldedHead)
    head.group_weight.data *= 50
    hidden = make_hidden(num_rows)
    expected = head.log_prob(hidden).topk(3, dim=-1)
    counter = GroupCounter(head)
    monkeypatch.setattr(head.scorer, "group_log_prob", counter)
    values, tokens = head.topk(hidden, 3)
    torch.testing.assert_close(values, expected.values, rtol=1e-12, atol=1e-12)
    assert torch.equal(tokens, expected.indices)
    assert 0 < counter.num_groups <= num_rows * head.partition.num_groups // 4


def cut_distribution(
    log_prob: list[float], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> list[float]:
    """The distribution that a sample must follow, in plain Python from its definition."""
    weights = torch.tensor(log_prob, dtype=torch.float64).div(temperature).exp().tolist()
    likeliest = sorted(range(len(weights)), key=lambda token: -weights[token])[:top_k]
    total = sum(weights[token] for token in likeliest)
    kept: list[int] = []
    mass = 0.0
    for token in likeliest:
        if top_p is not None and mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    return [weights[token] / total / mass if token in kept else 0.0 for token in range(len(weights))]


@one_case_a_kind(SAMPLING, [6, 1, 29])
def test_samples_follow_the_distribution(kind: str, settings: dict[str, Any], group_size: int) -> None:
    head, _ = make_head(kind, Layout(29, group_size, shuffled=True), weight_std=0.5)
    hidden = make_hidden(1)
    probability = cut_distribution(head.log_prob(hidden)[0].tolist(), **settings)
    generator = torch.Generator().manual_seed(11)
    draws = head.sample(hidden.expand(NUM_DRAWS, -1), generator=generator, **settings)
    assert draws.shape == (NUM_DRAWS,)
    counts = torch.bincount(draws, minlength=29).tolist()
    assert not any(count for count, share in zip(counts, probability, strict=True) if share == 0)
    observed, expected, rare_observed, rare_expected = [], [], 0.0, 0.0
    for count, share in zip(counts, probability, strict=True):
        if share * NUM_DRAWS >= 5:
            observed.append(float(count))
            expected.append(share * NUM_DRAWS)
        else:
            rare_observed, rare_expected = rare_observed + count, rare_expected + share * NUM_DRAWS
    if rare_expected > 0:
        observed.append(rare_observed)
        expected.append(rare_expected)
    assert len(expected) > 3
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@every_kind
def test_rows_are_drawn_from_their_own_distribution(kind: str) -> None:
    head, _ = make_head(kind, LAYOUTS["prime"], weight_std=20.0)
    hidden = make_hidden(30)
    likeliest = head.log_prob(hidden).max(dim=-1)
    sure = likeliest.values > -1e-7
    assert sure.sum() > 3
    assert likeliest.indices[sure].unique().numel() > 1
    for settings in SAMPLING.values():
        assert torch.equal(head.sample(hidden, **settings)[sure], likeliest.indices[sure])


@one_case_a_kind(LAYOUTS)
def test_cold_samples_are_the_likeliest_tokens(kind: str, layout: Layout) -> None:
    head, _ = make_head(kind, layout)
    head.float()
    hidden = make_hidden(20).float()
    likeliest = head.log_prob(hidden).argmax(dim=-1)
    cold: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1e-39}, {"top_k": 1}, {"top_p": 1e-9}]
    for settings in cold:
        assert torch.equal(head.sample(hidden, **settings), likeliest)


@one_case_a_kind(SAMPLING)
def test_a_seed_fixes_the_draw(kind: str, settings: dict[str, Any]) -> None:
    head, _ = make_head(kind, LAYOUTS["prime"], weight_std=0.1)
    hidden = make_hidden(50)
    first, second, other = (
        head.sample(hidden, generator=torch.Generator().manual_seed(seed), **settings) for seed in (4, 4, 5)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not first.requires_grad
    assert head.sample(hidden[:0], **settings).shape == (0,)


def test_top_p_of_one_keeps_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the running sum reaches 1 at the first token; the rare ones must stay possible."""
    drawn_from: list[Tensor] = []

    def first_column(probability: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
        drawn_from.append(probability)
        return torch.zeros(len(probability), num_samples, dtype=torch.int64)

    monkeypatch.setattr(torch, "multinomial", first_column)
    log_prob = torch.tensor([[0.0, -18.0, -19.0]])
    for top_p in (1.0, 0.999):
        draw_from_sorted(log_prob, 1.0, top_p, None)
    assert [probability.count_nonzero() for probability in drawn_from] == [3, 1]


@one_case_a_kind([0, -1, 98])
def test_k_outside_the_vocabulary_is_refused(kind: str, k: int) -> None:
    head, _ = make_head(kind, LAYOUTS["prime"])
    with pytest.raises(UserError, match=f"k is {k}: choose between 1 and the vocabulary size 97"):
        head.topk(make_hidden(2), k)
    with pytest.raises(UserError, match=f"k is {k}"):
        head.sample(make_hidden(2), top_k=k)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.5}, "temperature is -0.5: choose 0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0.0}, "top_p is 0.0: choose more than 0"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": float("nan")}, "top_p is nan"),
    ({"temperature": 0.0, "top_p": -1.0}, "top_p is -1.0"),
]


@every_kind
def test_impossible_sampling_settings_are_refused(kind: str) -> None:
    head, _ = make_head(kind, LAYOUTS["prime"])
    for settings, message in IMPOSSIBLE:
        with pytest.raises(UserError, match=message):
            head.sample(make_hidden(2), **settings)
