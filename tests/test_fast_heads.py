"""Gradients computed in the forward pass: chunks, precisions and ways of use, against plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from head_cases import FAST_KINDS, HIDDEN_SIZE, LAYOUTS, Layout, Model, make_head, make_hidden
from vocabfold.heads import (
    FoldedHead,
    SortedLinearScorer,
    TokenScorer,
    equal_partition,
    kernels,
    linear,
    linear_blocks,
)
from vocabfold.heads.linear_blocks import BlockedLinearKernel
from vocabfold.heads.linear_kernel import LinearKernel
from vocabfold.heads.scorers import SortedTargets
from vocabfold.tokens import IGNORE_INDEX

PLAIN = {
    "scale_shift_sorted": "scale_shift",
    "low_rank_sorted": "low_rank",
    "sorted_free": "looped_free",
    "sorted_free_bias": "looped_free_bias",
    "sorted_tied": "looped_tied",
}
every_fast_kind = pytest.mark.parametrize("kind", FAST_KINDS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def twins(kind: str, layout: Layout) -> tuple[Model, Model]:
    """A model with a fast head, and one with the plain head and the same numbers."""
    _, fast = make_head(kind, layout)
    _, plain = make_head(PLAIN[kind], layout, seed=1)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def batch(layout: Layout, num_rows: int = 40) -> tuple[Tensor, Tensor]:
    targets = torch.randint(layout.vocabulary_size, (num_rows,), generator=torch.Generator().manual_seed(7))
    targets[::5] = IGNORE_INDEX
    return make_hidden(num_rows).requires_grad_(), targets


def gradients(loss: Tensor, hidden: Tensor, model: nn.Module, retain: bool = False) -> list[Tensor]:
    inputs = [hidden, *model.parameters()]
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True, retain_graph=retain))


@pytest.mark.parametrize("kind", ["sorted_free", "sorted_tied", "conditioned_free", "conditioned_tied"])
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), Layout(401, 9, shuffled=True)], ids=str)
def test_blocks_of_groups_hold_each_group(kind: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens' log-probabilities in windows over the rows are those of a group at a time, and so are gradients."""
    monkeypatch.setattr(linear, "GROUPS_A_BLOCK", 3)
    head, model = make_head(kind, layout)
    assert isinstance(head, FoldedHead)
    hidden = make_hidden(4).requires_grad_()
    groups = torch.arange(head.partition.num_groups).expand(4, -1)
    by_group = head.scorer.group_log_prob(hidden, groups)[:, head.partition.slot_exists]
    log_prob = head.scorer.position_log_prob(hidden)
    torch.testing.assert_close(log_prob, by_group, rtol=1e-12, atol=1e-12)
    weights = make_hidden(4 * layout.vocabulary_size)[:, 0].view(4, -1)
    expected, found = (
        gradients((weights * table).sum() + hidden.sum(), hidden, model) for table in (by_group, log_prob)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@every_fast_kind
@every_layout
def test_chunks_that_cut_groups_change_nothing(kind: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = twins(kind, layout)
    hidden, targets = batch(layout)
    expected = plain.head.loss(hidden, targets, True)
    expected_gradients = gradients(expected.loss, hidden, plain)
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(kernels, "FEWEST_ROWS", 3)
    result = fast.head.loss(hidden, targets, True)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.parts, expected.parts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(result.loss, hidden, fast), expected_gradients, rtol=1e-10, atol=1e-12)


@every_fast_kind
@every_layout
def test_each_rows_log_prob_may_be_weighted(kind: str, layout: Layout) -> None:
    fast, plain = twins(kind, layout)
    hidden, targets = batch(layout)
    weights = torch.randn(len(targets), dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    found, expected = (model.head.target_log_prob(hidden, targets) for model in (fast, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found_gradients = gradients((weights * found).sum(), hidden, fast)
    expected_gradients = gradients((weights * expected).sum(), hidden, plain)
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-10, atol=1e-12)


def test_rows_of_a_tied_weight_with_gaps_between_them() -> None:
    """Where a shortlist comes from the middle of the vocabulary the others rise, but do not follow each other."""
    layout = Layout(40, 6, shortlist=2)
    order = torch.tensor([9, 25, *(token for token in range(40) if token not in (9, 25))])
    _, fast = make_head("sorted_tied", layout, order=order)
    _, plain = make_head("looped_tied", layout, order=order, seed=1)
    plain.load_state_dict(fast.state_dict())
    hidden, targets = batch(layout)
    result, expected = fast.head.loss(hidden, targets), plain.head.loss(hidden, targets)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(result.loss, hidden, fast), gradients(expected.loss, hidden, plain))


@every_fast_kind
def test_nothing_of_the_size_of_the_logits_is_kept(kind: str) -> None:
    layout, num_rows = Layout(1021, None, shuffled=True, shortlist=60), 20_000
    _, model = make_head(kind, layout)
    head = model.float().head
    assert isinstance(head, FoldedHead)
    hidden = torch.randn(num_rows, HIDDEN_SIZE, requires_grad=True)
    targets = torch.arange(num_rows) % layout.vocabulary_size
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    for method in (head.loss, head.target_log_prob):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result: Any = method(hidden, targets)
    assert largest == num_rows * HIDDEN_SIZE
    assert result.shape == (num_rows,)


@every_fast_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(kind: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS["shortlist"]
    fast, plain = (model.float() for model in twins(kind, layout))
    hidden, targets = batch(layout)
    hidden = hidden.detach().float().requires_grad_()
    expected = gradients(plain.head.loss(hidden, targets).loss, hidden, plain)
    for given_dtype in (torch.float32, dtype):
        given = hidden.detach().to(given_dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            result = fast.head.loss(given, targets, True)
            rows = -fast.head.target_log_prob(given, targets).sum() / result.num_targets
        for loss in (result.loss, rows):
            assert loss.dtype == torch.float32
            found = gradients(loss, given, fast)
            assert [gradient.dtype for gradient in found] == [given_dtype, *[torch.float32] * (len(found) - 1)]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.004)


@every_fast_kind
def test_a_scaled_loss_keeps_small_gradients_in_half_precision(kind: str) -> None:
    """A mean over many rows has gradients below what fp16 can hold; loss scaling must save them."""
    layout, num_rows, scale = LAYOUTS["shortlist"], 30_000, 65_536.0
    fast, plain = (model.float() for model in twins(kind, layout))
    targets = torch.arange(num_rows) % layout.vocabulary_size
    hidden = make_hidden(num_rows).half()
    given, exact = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = fast.head.loss(given, targets).loss
    found = gradients(loss * scale, given, fast)
    expected = gradients(plain.head.loss(exact, targets).loss * scale, exact, plain)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert (one.float() - other).norm() <= 0.01 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_in_half_precision_is_multiplied_by_the_whole_factor(dtype: torch.dtype) -> None:
    """1e-6, one over a million rows, has 4 bits in float16."""
    gradient, factor = torch.linspace(900, 1100, 40).to(dtype), torch.tensor(1.003e-6)
    expected = (gradient.double() * factor.double()).to(dtype)
    torch.testing.assert_close(kernels._scaled(gradient, factor, True), expected, rtol=0, atol=0)


@every_fast_kind
def test_ways_of_calling_backward(kind: str) -> None:
    layout = LAYOUTS["group_size_not_dividing"]
    fast, plain = twins(kind, layout)
    hidden, targets = batch(layout)
    expected = gradients(3 * plain.head.loss(hidden, targets).loss, hidden, plain)
    loss = fast.head.loss(hidden, targets).loss
    for retain in (True, True, False):
        torch.testing.assert_close(gradients(3 * loss, hidden, fast, retain), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()

    for _ in range(3):  # accumulation
        fast.head.loss(hidden, targets).loss.backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-10, atol=1e-12)
    for parameter, gradient in zip(fast.parameters(), expected[1:], strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)

    (first,) = torch.autograd.grad(fast.head.loss(hidden, targets).loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@every_fast_kind
def test_no_gradient_is_computed_where_none_is_wanted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["prime"]
    fast, plain = twins(kind, layout)
    hidden, targets = batch(layout)
    expected = plain.head.loss(hidden, targets).loss
    asked: list[bool] = []
    original = kernels.log_prob_and_slope

    def spy(logits: Tensor, slots: Tensor, weights: Tensor | None, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        asked.append(with_slope)
        return original(logits, slots, weights, with_slope)

    for module in ("kernels", "scorers", "linear_kernel"):
        monkeypatch.setattr(f"vocabfold.heads.{module}.log_prob_and_slope", spy)
    with torch.no_grad():
        loss = fast.head.loss(hidden, targets).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    frozen = copy.deepcopy(fast).requires_grad_(False)
    torch.testing.assert_close(frozen.head.loss(hidden.detach(), targets).loss, loss)
    assert asked and not any(asked)


def test_a_frozen_embedding_costs_no_gradient() -> None:
    fast, plain = twins("sorted_tied", LAYOUTS["prime"])
    for model in (fast, plain):
        model.embedding.requires_grad_(False)
    hidden, targets = batch(LAYOUTS["prime"])
    for model in (fast, plain):
        model.head.loss(hidden, targets).loss.backward()
        assert model.embedding.weight.grad is None
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@every_fast_kind
@pytest.mark.parametrize("shuffled", [False, True])
def test_training_steps_are_those_of_the_plain_head(kind: str, shuffled: bool) -> None:
    """AdamW on a model whose tied embedding gets gradients from both of its ends."""
    layout = Layout(50, 7, shuffled=shuffled, shortlist=4)
    models = twins(kind, layout)
    tokens = torch.arange(30).remainder(17)
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=True)
        for _ in range(4):
            optimizer.zero_grad(set_to_none=True)
            loss = model.head.loss(model.embedding(tokens).tanh(), (tokens + 1) % 50).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_of_blocks(layout: Layout, tied: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device without Triton runs, on a CPU, gives what the loop over the groups gives."""
    monkeypatch.setattr(linear_blocks, "GATHERED_ELEMENTS", 500)
    monkeypatch.setattr(kernels, "FIXED_CHUNK_ELEMENTS", 1)
    torch.manual_seed(0)
    partition = equal_partition(layout.vocabulary_size, layout.group_size, layout.order(), layout.shortlist)
    num_rows, hidden_size = 150, 16
    weight = torch.randn(layout.vocabulary_size if tied else len(partition.multi_tokens), hidden_size)
    bias, hidden = torch.randn(len(partition.multi_tokens)), torch.randn(num_rows, hidden_size)
    inputs = tuple(tensor.double() if dtype == torch.float64 else tensor for tensor in (hidden, weight, bias))
    tokens = torch.randint(layout.vocabulary_size, (num_rows,))
    rows = (partition.group_of[tokens], partition.slot_of[tokens], torch.rand(num_rows) < 0.8)
    weights = torch.rand(num_rows, dtype=inputs[0].dtype)
    plain = LinearKernel(partition, SortedTargets(partition, *rows), tied, inputs[0].dtype)
    expected = plain(inputs, weights, [True] * 3, True)
    kernel = BlockedLinearKernel(partition, SortedTargets(partition, *rows, fixed=True), tied, dtype)
    found = kernel(inputs, weights, [True] * 3, True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.3, torch.float16: 0.04}[dtype]
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=tolerance)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert one is not None and other is not None
        assert (one - other).norm() <= tolerance * max(1.0, float(other.norm()))
    if dtype in (torch.float64, torch.float32):
        assert found.hits is not None and expected.hits is not None and torch.equal(found.hits, expected.hits)


def test_asking_for_few_groups_reads_only_their_rows() -> None:
    layout = Layout(401, 5, shuffled=True, shortlist=11)
    for kind in ("sorted_free", "sorted_tied"):
        fast, plain = twins(kind, layout)
        scorers: list[TokenScorer] = []
        for model in (fast, plain):
            assert isinstance(model.head, FoldedHead)
            scorers.append(model.head.scorer)
        assert isinstance(scorers[0], SortedLinearScorer)
        groups = torch.tensor([[0, 30, 12], [88, 11, 40]])
        found, expected = (scorer.group_log_prob(make_hidden(2), groups) for scorer in scorers)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["scale_shift_sorted", "sorted_tied"])
def test_compiled_models_take_the_heads_as_they_are(kind: str) -> None:
    fast, plain = twins(kind, LAYOUTS["shortlist"])
    hidden, targets = batch(LAYOUTS["shortlist"])
    expected = plain.head.loss(hidden, targets).loss
    compiled = torch.compile(fast.head, backend="eager")
    result = compiled(hidden, targets)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(result.loss, hidden, fast), gradients(expected, hidden, plain))
