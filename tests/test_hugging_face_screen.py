"""The screened output layer picks what the product with all rows picks, and draws from the same distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from torch.nn import functional as F

from test_hugging_face_metrics import Largest
from vocabfold.errors import UserError
from vocabfold.hugging_face import draws, int8_product, quantised_rows
from vocabfold.hugging_face.int8_product import fbgemm_product, onednn_product
from vocabfold.hugging_face.quantised_rows import QuantisedRows
from vocabfold.hugging_face.screened_head import ScreenedHead
from vocabfold.hugging_face.screened_state import Counts

NUM_DRAWS = 800


def uneven(num_rows: int, size: int, seed: int = 0) -> Tensor:
    """Random rows of very different norms, some with a single large number: their bounds differ much."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, size, generator=generator) * torch.rand(num_rows, 1, generator=generator).exp()
    rows[::7, seed % size] += 6
    return rows


def dense_greedy(hidden: Tensor, rows: Tensor, batch: int) -> Tensor:
    return torch.cat([F.linear(some, rows).argmax(dim=-1) for some in hidden.split(batch)])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 80),
    num_states=st.integers(1, 7),
    row_scale=st.floats(-25, 12),
    state_scale=st.floats(-5, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    parts=st.sampled_from([1, 2]),
)
def test_the_bounds_hold(
    seed: int, size: int, num_states: int, row_scale: float, state_scale: float, dtype: torch.dtype, parts: int
) -> None:
    rows = (uneven(33, size, seed) * 10**row_scale).to(dtype)
    hidden = (uneven(num_states, size, seed + 1) * 10**state_scale).to(dtype)
    quantised = QuantisedRows(rows)
    states = quantised.round_states(hidden, parts)
    upper = quantised.upper_bounds(states)[:, :33].double()
    lower = upper - 2 * states.reach.unsqueeze(-1) * states.margin[:33].double()
    exact = hidden.double() @ rows.double().T / states.scale.unsqueeze(-1)
    summed = (F.linear(hidden.float(), rows.float()).double() / states.scale.unsqueeze(-1))[states.in_range]
    assert bool((exact <= upper)[states.in_range].all()) and bool((exact >= lower)[states.in_range].all())
    assert bool((summed <= upper[states.in_range]).all()) and bool((summed >= lower[states.in_range]).all())
    if row_scale > -15 and state_scale > -2:
        assert bool(states.in_range.all())


@pytest.mark.parametrize("build", [fbgemm_product, onednn_product])
def test_int8_products_are_exact_and_one_that_saturates_is_found_out(build: Any) -> None:
    rows = torch.randint(-127, 128, (70, 33), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    rows[5] = 127
    scale = torch.rand(70) + 0.1
    product = build(rows, scale)
    assert int8_product.is_exact(product, rows, scale)
    assert not int8_product.is_exact(lambda steps: product(steps).clamp(max=2.0**15), rows * 0 + 127, scale * 0 + 1)
    assert not int8_product.is_exact(lambda steps: product(steps) * (1 + 1e-6), rows, scale)


def test_without_an_exact_product_there_is_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hidden = uneven(40, 8), uneven(2, 8, seed=1)
    monkeypatch.setattr(int8_product, "fbgemm_product", lambda rows, scale: lambda steps: steps @ rows.float().T * 0)
    assert torch.equal(ScreenedHead(rows).greedy(hidden), dense_greedy(hidden, rows, 2))
    monkeypatch.setattr(int8_product, "onednn_product", lambda rows, scale: torch.ops.onednn.no_such_operator)
    with pytest.raises(UserError, match="no exact int8 product"):
        ScreenedHead(rows)


def test_the_bounds_are_as_tight_as_the_residuals() -> None:
    rows, hidden = uneven(200, 64), uneven(2, 64, seed=1)
    quantised = QuantisedRows(rows)
    states = quantised.round_states(hidden)
    half_width = states.reach.unsqueeze(-1) * states.margin[:200] * states.scale.unsqueeze(-1)
    step = rows.abs().amax(dim=-1) / 127
    # A residual has at most half a step in each of D places.
    assert bool((half_width <= 0.5 * step * 8 * hidden.norm(dim=-1, keepdim=True) * 1.15).all())


@pytest.mark.parametrize(("dtype", "num_states"), [(torch.float32, 10_000), (torch.bfloat16, 2_000)])
def test_ten_thousand_greedy_tokens_are_those_of_the_dense_product(dtype: torch.dtype, num_states: int) -> None:
    rows = uneven(1501, 48).to(dtype)
    hidden = uneven(num_states, 48, seed=1).to(dtype)
    head = ScreenedHead(rows)
    assert torch.equal(head.greedy(hidden), dense_greedy(hidden, rows, 16))
    assert head.counts.states == num_states
    assert head.counts.dense < 0.05 * num_states / 16
    assert head.counts.scored < 100 * num_states
    head.counts = Counts()
    one_by_one = torch.cat([head.greedy(state) for state in hidden[:500].split(1)])
    assert torch.equal(one_by_one, dense_greedy(hidden[:500], rows, 1))
    assert head.counts.products == 500
    assert head.bytes_read < 0.8 * 500 * rows.numel() * rows.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 40, 200])
def test_the_k_best_are_those_of_the_dense_product(dtype: torch.dtype, k: int) -> None:
    rows, hidden = uneven(200, 24).to(dtype), uneven(48, 24, seed=2).to(dtype)
    logits, tokens = ScreenedHead(rows).topk(hidden, k)
    dense = torch.cat([F.linear(some, rows) for some in hidden.split(16)]).double()
    # Equal logits of bfloat16: the smaller id is the better.
    expected = dense.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(tokens.sort(dim=-1).values, expected.indices[:, :k].sort(dim=-1).values)
    torch.testing.assert_close(logits.double(), expected.values[:, :k], rtol=0.008, atol=1e-4)
    assert bool((logits[:, 1:] <= logits[:, :-1]).all())


def adversarial() -> dict[str, tuple[Tensor, Tensor]]:
    rows, hidden = uneven(300, 16), uneven(20, 16, seed=3)
    close = rows[:1] + 1e-7 * torch.randn(300, 16, generator=torch.Generator().manual_seed(4))
    not_finite = hidden.clone()
    not_finite[3, 5], not_finite[4, 1], not_finite[5] = float("nan"), float("inf"), float("-inf")
    return {
        "every row twice": (rows[:150].repeat(2, 1), hidden),
        "equal rows": (rows[:1].repeat(300, 1), hidden),
        "rows closer than rounding": (close, hidden),
        "zero rows": (rows * (torch.arange(300) % 3 == 0).unsqueeze(-1), hidden),
        "all rows zero": (torch.zeros(300, 16), hidden),
        "negative logits": (-rows.abs(), hidden.abs()),
        "large rows": (rows * 1e30, hidden),
        "overflowing logits": (rows * 1e30, hidden * 1e15),
        "overflowing bounds": (rows * 2e34, hidden),
        "one large row": (rows * torch.where(torch.arange(300) == 7, 1e20, 1.0).unsqueeze(-1), hidden),
        "tiny rows": (rows * 1e-35, hidden),
        "denormal rows": (rows * 1e-42, hidden),
        "zero states": (rows, hidden * (torch.arange(20) % 2).unsqueeze(-1)),
        "tiny states": (rows, hidden * 1e-30),
        "states that are not finite": (rows, not_finite),
        "one column": (rows[:, :1], hidden[:, :1]),
        "one row": (rows[:1], hidden),
    }


ADVERSARIAL = adversarial()


@pytest.mark.parametrize("panel", [128, quantised_rows.PANEL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_rows_and_states(
    case: str, dtype: torch.dtype, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised_rows, "PANEL", panel)
    rows, hidden = (each.to(dtype) for each in ADVERSARIAL[case])
    for batch in (1, 16):
        head = ScreenedHead(rows)
        got = torch.cat([head.greedy(some) for some in hidden.split(batch)])
        assert torch.equal(got, dense_greedy(hidden, rows, batch))


def test_panels_change_no_token_and_bounds_of_a_batch_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hidden = uneven(3000, 16), uneven(160, 16, seed=2)
    rows[1500:2900] = rows[:1400]  # ties whose other half lies panels away
    whole = ScreenedHead(rows)
    upper = whole.quantised.upper_bounds(whole.quantised.round_states(hidden[:5]))
    monkeypatch.setattr(quantised_rows, "PANEL", 512)
    head = ScreenedHead(rows)
    assert len(head.quantised.products) == 6
    states = head.quantised.round_states(hidden[:5])
    assert torch.equal(head.quantised.upper_bounds(states), upper)
    for index in range(5):
        assert torch.equal(head.quantised.upper_bounds(states.one(index))[0], upper[index])
    expected = dense_greedy(hidden, rows, 16)
    assert torch.equal(head.greedy(hidden), expected) and torch.equal(whole.greedy(hidden), expected)
    distinct = ScreenedHead(rows[:1500].contiguous())
    with Largest() as largest:
        assert len(distinct.greedy(hidden)) == 160
    assert distinct.counts.dense == 0 and largest.elements <= 32 * 512


def test_ties_and_flat_states_are_counted() -> None:
    rows, hidden = uneven(3000, 16), uneven(4, 16, seed=5)
    equal = ScreenedHead(rows[:1].repeat(3000, 1))
    equal.greedy(hidden[:1])
    assert equal.counts == Counts(states=1, products=1, scored=2, dense_flat=1)
    twice = ScreenedHead(rows[:500].repeat(2, 1))
    twice.greedy(hidden)
    assert twice.counts.dense_ties == 1  # one product serves all four states
    unbounded = ScreenedHead(rows)
    unbounded.greedy(torch.zeros(1, 16))
    assert unbounded.counts.dense_range == 1
    assert unbounded.bytes_read == 3072 * (16 + 8) + 3000 * 16 * 4


def test_a_column_much_larger_than_the_others_leaves_few_candidates() -> None:
    rows, hidden = uneven(3000, 16), uneven(16, 16, seed=5)
    hidden[:, 3] = 200
    head = ScreenedHead(rows)
    assert torch.equal(head.greedy(hidden), F.linear(hidden, rows).argmax(dim=-1))
    assert head.counts.products == 1 and head.counts.dense == 0 and head.counts.scored < 16 * 6


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.4}, {"temperature": 3.0}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}],
    ids=str,
)
def test_draws_follow_the_dense_softmax(options: dict[str, float], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "SCORED_FIRST", 4)  # so that most tokens are proposed by their bounds
    monkeypatch.setattr(quantised_rows, "SHARES", {1: 2.0**-3, 2: 2.0**-3})  # and these are loose
    if batch == 16:
        monkeypatch.setattr(draws, "MOST_PROPOSALS", 2)  # some draws come from all rows
    rows, hidden = uneven(60, 16), uneven(1, 16, seed=6) * 0.05
    head = ScreenedHead(rows)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        head.sample(hidden.expand(batch, -1), generator=generator, **options)  # type: ignore[arg-type]
        for _ in range(NUM_DRAWS // batch)
    ]
    counts = torch.bincount(torch.cat(drawn), minlength=60).double()
    expected = reference(F.linear(hidden, rows)[0], **options) * counts.sum()  # type: ignore[arg-type]
    assert counts[expected == 0].sum() == 0
    assert (expected > 5).sum() >= 4
    kept = expected > 0
    assert chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def reference(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """The distribution in float64."""
    ranked = (logits.double() / temperature).sort(descending=True, stable=True)
    probability = ranked.values.clone()
    if top_k is not None:
        probability[top_k:] = float("-inf")
    probability = probability.softmax(dim=-1)
    if top_p < 1:
        probability[probability.cumsum(dim=-1) - probability >= top_p] = 0
    return torch.zeros_like(probability).scatter(0, ranked.indices, probability / probability.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_the_dense_softmax(
    top_p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "SCORED_FIRST", 4)
    rows, hidden = (uneven(150, 16) * 0.3).to(dtype), uneven(6, 16, seed=7).to(dtype)
    head = ScreenedHead(rows)
    for state, logits in zip(head._screened(hidden), (hidden.double() @ rows.double().T).to(dtype), strict=True):
        proposals = draws.Proposals(state, 1.0)
        inside = torch.tensor([proposals.is_inside(token, top_p) for token in range(150)])
        assert torch.equal(inside, reference(logits, top_p=top_p) > 0)


def test_a_distribution_that_the_bounds_do_not_help_is_drawn_from_all_rows() -> None:
    rows = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    head = ScreenedHead(rows)
    head.sample(torch.full((1, 16), 1e4), temperature=0.01)
    assert head.counts.dense_flat == 0
    head.sample(torch.full((16, 16), 1e-4), top_p=0.5)  # half of 3,000 tokens, about equally likely
    assert head.counts.dense_flat == 1


def test_what_cannot_be_screened_is_one_line() -> None:
    rows = uneven(20, 8)
    head = ScreenedHead(rows)
    hidden = uneven(2, 8, seed=8)
    refused = {
        "on meta in float32": lambda: ScreenedHead(rows.to("meta")),
        "on cpu in float16": lambda: ScreenedHead(rows.half()),
        "row 3 of the output layer is not finite": lambda: ScreenedHead(rows.index_fill(0, torch.tensor(3), torch.nan)),
        "row 5 of the output layer": lambda: ScreenedHead(rows.index_fill(0, torch.tensor(5), torch.inf)),
        "k is 21": lambda: head.topk(hidden, 21),
        "k is 0": lambda: head.sample(hidden, top_k=0),
        "temperature is -1": lambda: head.sample(hidden, temperature=-1.0),
        "temperature is nan": lambda: head.sample(hidden, temperature=float("nan")),
        "top_p is 0": lambda: head.sample(hidden, top_p=0.0),
        "hidden states are": lambda: head.greedy(hidden.bfloat16()),
        "give \\[N, 8\\]": lambda: head.greedy(hidden[0]),
        "not finite: nothing can be drawn": lambda: head.sample(hidden * torch.nan),
        "nothing can be drawn": lambda: head.sample(hidden * torch.nan, top_k=3),
    }
    for message, action in refused.items():
        with pytest.raises(UserError, match=message) as error:
            action()
        assert "\n" not in str(error.value)
    assert head.greedy(hidden[:0]).shape == (0,)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(UserError, match="less than float32"):
            head.greedy(hidden)
    finally:
        torch.set_float32_matmul_precision("highest")
    rows[0] += 1
    with pytest.raises(UserError, match="screen the model again"):
        head.greedy(hidden)
