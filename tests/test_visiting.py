"""Bounds, nuclei and draws of a folded head against its whole distribution, on thousands of random cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from head_cases import HIDDEN_SIZE, LAYOUTS, Layout, every_pair, make_head, make_hidden
from test_head_sampling import GroupCounter, cut_distribution
from vocabfold.heads import FoldedHead, ScaleShiftScorer, visiting
from vocabfold.heads.visiting import TemperedGroups, cut_to_nucleus, draw, is_surely_in_nucleus

TEMPERATURES = (0.05, 0.4, 0.9, 1.0, 1.3, 4.0, float("inf"))
TOP_P = (1e-6, 0.1, 0.5, 0.9, 0.999)
NUM_DRAWS = 6_000
WEIGHT_STDS = (0.05, 0.5, 1.5, 5.0)  # distributions from flat to peaked
every_layout_and_temperature = pytest.mark.parametrize(
    ("layout", "temperature", "weight_std"), every_pair(LAYOUTS, TEMPERATURES, WEIGHT_STDS)
)


def tempered(layout: Layout, temperature: float, weight_std: float, num_rows: int = 6) -> tuple[TemperedGroups, Tensor]:
    """(What is known by group, log w [N, V] of the full distribution)."""
    head, _ = make_head("sorted_free", layout, weight_std)
    assert isinstance(head, FoldedHead)
    hidden = make_hidden(num_rows)
    with torch.no_grad():
        log_prob = head.log_prob(hidden)
        best = log_prob.max(dim=-1, keepdim=True).values
        groups = TemperedGroups(head.partition, head.scorer, hidden, head.group_log_prob(hidden) - best, temperature)
    return groups, (log_prob - best) / temperature


def ranked_mass(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [N, V] from the likeliest down, the share of the mass before each)."""
    weights, order = log_weights.exp().sort(dim=-1, descending=True, stable=True)
    return order, (weights.cumsum(dim=-1) - weights) / weights.sum(dim=-1, keepdim=True)


@every_layout_and_temperature
def test_bounds_hold(layout: Layout, temperature: float, weight_std: float) -> None:
    groups, log_weights = tempered(layout, temperature, weight_std)
    low, high = groups.mass_bounds()
    for group in range(groups.partition.num_groups):
        weights = log_weights[:, groups.partition.group_of == group]
        mass = weights.logsumexp(dim=-1)
        assert (low[:, group] <= mass + 1e-9).all()
        assert (mass <= high[:, group] + 1e-9).all()
        assert (weights.max(dim=-1).values <= groups.token_bound()[:, group] + 1e-9).all()
        visited = groups.visit(torch.full((len(weights), 1), group))[:, 0]
        torch.testing.assert_close(visited.logsumexp(dim=-1), mass, rtol=1e-9, atol=1e-9)
    if temperature == 1.0:
        assert torch.equal(low, high)


@every_layout_and_temperature
def test_membership_of_every_token(layout: Layout, temperature: float, weight_std: float) -> None:
    """Each row of each case asks for each token: some 5,000 questions in all layouts and temperatures."""
    vocabulary_size = layout.vocabulary_size
    groups, log_weights = tempered(layout, temperature, weight_std, num_rows=2)
    order, before = ranked_mass(log_weights)
    share_before = torch.empty_like(before).scatter(-1, order, before)
    rows = torch.arange(2).repeat_interleave(vocabulary_size)
    tokens = torch.arange(vocabulary_size).repeat(2)
    many = groups.select(rows)
    for top_p in TOP_P:
        surely = is_surely_in_nucleus(many, tokens, log_weights[rows, tokens], top_p).view(2, -1)
        kept = cut_to_nucleus(many, tokens, log_weights[rows, tokens], top_p, torch.Generator().manual_seed(7))
        is_clear, inside = (share_before - top_p).abs() > 1e-9, share_before < top_p
        assert not (surely & ~inside)[is_clear].any()
        assert torch.equal(kept.view(2, -1)[is_clear & inside], tokens.view(2, -1)[is_clear & inside])
        assert (share_before.gather(-1, kept.view(2, -1)) < top_p + 1e-9).all()


def replaced_draws(
    groups: TemperedGroups, log_weights: Tensor, top_p: float, num_draws: int, generator: torch.Generator
) -> Tensor:
    """[N, num_draws] of what each row's least likely token is replaced by."""
    worst = ranked_mass(log_weights)[0][:, -1:]
    many = groups.select(torch.arange(len(worst)).repeat_interleave(num_draws))
    tokens, weights = (of_row.expand(-1, num_draws).flatten() for of_row in (worst, log_weights.gather(-1, worst)))
    return cut_to_nucleus(many, tokens, weights, top_p, generator).view(-1, num_draws)


@every_layout_and_temperature
def test_draws_stay_in_the_nucleus_and_reach_all_of_it(layout: Layout, temperature: float, weight_std: float) -> None:
    num_draws = 60
    groups, log_weights = tempered(layout, temperature, weight_std)
    order, before = ranked_mass(log_weights)
    for top_p in TOP_P:
        tokens = replaced_draws(groups, log_weights, top_p, num_draws, torch.Generator().manual_seed(2))
        share_before = torch.empty_like(before).scatter(-1, order, before)
        assert (share_before.gather(-1, tokens) < top_p + 1e-9).all()
        size = (before < top_p).sum(dim=-1)
        for row in (size == 1).nonzero().flatten().tolist():
            assert (tokens[row] == order[row, 0]).all()
        for row in ((size > 8) & (before[:, -1] >= top_p)).nonzero().flatten().tolist():
            assert tokens[row].unique().numel() > 1


def test_equally_likely_tokens_share_a_nucleus_of_the_smallest_size() -> None:
    head, model = make_head("scale_shift_sorted", LAYOUTS["shortlist"])
    for parameter in model.parameters():
        parameter.data.zero_()
    assert isinstance(head, FoldedHead)
    log_prob = head.log_prob(make_hidden(1))[0]
    draws = head.sample(make_hidden(1).expand(2000, -1), top_p=0.3, generator=torch.Generator().manual_seed(0))
    _, before = ranked_mass(log_prob[None])
    smallest = int((before < 0.3).sum())
    assert draws.unique().numel() <= smallest + 1


def chi_squared_p(draws: Tensor, probability: Tensor) -> float:
    counts = torch.bincount(draws, minlength=len(probability)).double()
    assert counts[probability == 0].eq(0).all()
    often = probability * len(draws) >= 5
    observed, expected = counts[often].tolist(), (probability[often] * len(draws)).tolist()
    rest = float(probability[~often].sum()) * len(draws)
    if rest > 1e-6:
        observed.append(float(counts[~often].sum()))
        expected.append(rest)
    return float(stats.chisquare(observed, expected).pvalue) if len(expected) > 1 else 1.0


@pytest.mark.parametrize(
    ("settings", "layout", "kind"),
    every_pair(
        [
            {"temperature": 0.2},
            {"temperature": 0.7},
            {"temperature": 2.5},
            {"top_p": 0.05},
            {"top_p": 0.95},
            {"temperature": 0.6, "top_p": 0.9},
            {"temperature": 1.6, "top_p": 0.7},
            {"temperature": 1.6, "top_k": 9, "top_p": 0.7},
        ],
        {name: LAYOUTS[name] for name in ("prime", "shortlist", "one_slot", "one_group")},
        ["scale_shift_sorted", "low_rank_sorted", "sorted_tied"],
    ),
)
def test_samples_follow_the_cut_distribution(settings: dict[str, Any], layout: Layout, kind: str) -> None:
    head, _ = make_head(kind, layout, weight_std=0.6)
    hidden = make_hidden(1)
    probability = torch.tensor(cut_distribution(head.log_prob(hidden)[0].tolist(), **settings), dtype=torch.float64)
    draws = head.sample(hidden.expand(NUM_DRAWS, -1), generator=torch.Generator().manual_seed(3), **settings)
    assert chi_squared_p(draws, probability) > 1e-5


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_a_drawn_token_comes_with_its_weight(temperature: float) -> None:
    for weight_std in WEIGHT_STDS:
        groups, log_weights = tempered(LAYOUTS["shortlist"], temperature, weight_std, num_rows=50)
        tokens, found = draw(groups, torch.Generator().manual_seed(1))
        torch.testing.assert_close(found, log_weights.gather(-1, tokens[:, None])[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.8}, {"top_p": 0.9}, {"temperature": 0.8, "top_p": 0.9}], ids=str
)
def test_sampling_leaves_unlikely_groups_alone(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows = 64
    head, _ = make_head("sorted_free", Layout(401, 5, shortlist=20), weight_std=0.5)
    assert isinstance(head, FoldedHead)
    head.group_weight.data *= 10
    counter = GroupCounter(head)
    monkeypatch.setattr(head.scorer, "group_log_prob", counter)
    head.sample(make_hidden(num_rows), generator=torch.Generator().manual_seed(0), **settings)
    assert 0 < counter.num_groups <= num_rows * head.partition.num_groups // 4


def test_a_shortlist_is_not_visited_for_the_best_token(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = make_head("scale_shift_sorted", Layout(401, 5, shortlist=200), weight_std=0.1)
    assert isinstance(head, FoldedHead)
    head.group_weight.data[:200] += 3 * make_hidden(1)
    hidden = make_hidden(1)
    expected = head.log_prob(hidden).topk(3).indices
    assert (expected < 200).all()
    counter = GroupCounter(head)
    monkeypatch.setattr(head.scorer, "group_log_prob", counter)
    assert torch.equal(head.topk(hidden, 3)[1], expected)
    assert counter.num_groups == 0


@pytest.mark.parametrize("kind", ["scale_shift", "low_rank_sorted", "sorted_tied"])
@pytest.mark.parametrize("k", [1, 7])
def test_flat_rows_are_taken_as_a_whole_and_peaked_rows_are_not(
    kind: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 groups a flat row has its first visit and no more; whole rows come two at a time."""
    monkeypatch.setattr(visiting, "WHOLE_ROWS_ELEMENTS", 2 * 401)
    head, model = make_head(kind, Layout(401, 5, shuffled=True), weight_std=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(("shift", "bias")):
            parameter.data.mul_(0.01)
    assert isinstance(head, FoldedHead)
    flatness = torch.tensor([0.001, 20.0] * 5)[:9, None]
    hidden = flatness * make_hidden(9)
    expected = head.log_prob(hidden).topk(k, dim=-1)
    counter = GroupCounter(head)
    monkeypatch.setattr(head.scorer, "group_log_prob", counter)
    whole_rows: list[int] = []
    original = head.scorer.position_log_prob
    monkeypatch.setattr(
        head.scorer, "position_log_prob", lambda rows: (whole_rows.append(len(rows)), original(rows))[1]
    )
    values, tokens = head.topk(hidden, k)
    torch.testing.assert_close(values, expected.values, rtol=1e-12, atol=1e-12)
    assert torch.equal(tokens, expected.indices)
    assert whole_rows == [2, 2, 1]
    assert counter.num_groups <= 9 * 3 * visiting.GROUPS_A_VISIT


@pytest.mark.parametrize(
    ("temperature", "top_p", "weight_std"), every_pair([0.5, 1.0, 1.6], [0.3, 0.6, 0.9], [0.4, 0.8])
)
def test_a_nucleus_among_many_groups(temperature: float, top_p: float, weight_std: float) -> None:
    """80 groups, of which a few settle the nucleus while the mass of the others is known by its bounds alone."""
    head, _ = make_head("scale_shift", Layout(401, 5, shuffled=True), weight_std)
    assert isinstance(head, FoldedHead)
    hidden = make_hidden(1)
    log_prob = head.log_prob(hidden).detach()
    log_ratio = (head.group_log_prob(hidden) - log_prob.max()).detach()
    groups = TemperedGroups(head.partition, head.scorer, hidden, log_ratio, temperature)
    log_weights = (log_prob - log_prob.max()) / temperature
    draws = replaced_draws(groups, log_weights, top_p, 1500, torch.Generator().manual_seed(5))[0]
    expected = torch.tensor(cut_distribution(log_prob[0].tolist(), temperature, top_p=top_p), dtype=torch.float64)
    assert chi_squared_p(draws, expected) > 1e-5


def test_a_nucleus_goes_on_into_groups_not_yet_seen() -> None:
    """Every token of a group is likelier than the whole next group, so that none seen is ever outside."""
    head, _ = make_head("scale_shift", Layout(48, 2))
    assert isinstance(head, FoldedHead)
    hidden = torch.zeros(5000, HIDDEN_SIZE, dtype=torch.float64)
    hidden[:, 0] = 1.0
    head.group_weight.data[:, 0] = torch.arange(24, dtype=torch.float64) * torch.tensor(0.45).double().log()
    assert isinstance(head.scorer, ScaleShiftScorer)
    head.scorer.scale.data.zero_()
    head.scorer.shift.data.zero_()
    draws = head.sample(hidden, top_p=0.99999, generator=torch.Generator().manual_seed(5))
    expected = torch.tensor(cut_distribution(head.log_prob(hidden[:1])[0].tolist(), top_p=0.99999))
    assert chi_squared_p(draws, expected.double()) > 1e-5
    assert (draws >= 16).any()
