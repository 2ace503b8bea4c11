"""The gradient of a linear scorer's rows that waits for the end of the backward pass: every way to ask for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from head_cases import HIDDEN_SIZE, Layout, Model, make_head, make_hidden
from vocabfold.heads.linear_kernel import LinearKernel
from vocabfold.tokens import IGNORE_INDEX

# Slopes of N x S are smaller than the rows of V x D here, else the gradient would not wait.
NUM_ROWS = 40
LAYOUTS = [Layout(401, 20), Layout(401, 20, shuffled=True), Layout(401, 19, shuffled=True, shortlist=30)]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["token_order", "shuffled", "shortlist"])
every_tie = pytest.mark.parametrize("tied", [True, False], ids=["tied", "free"])


@pytest.fixture(autouse=True)
def late_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by "head" with every gradient that waited."""
    calls: list[str] = []
    original = LinearKernel._grad_weight

    def spy(self: LinearKernel, *arguments: Tensor) -> Tensor:
        calls.append("head")
        return original(self, *arguments)

    monkeypatch.setattr(LinearKernel, "_grad_weight", spy)
    return calls


def twins(layout: Layout, tied: bool) -> tuple[Model, Model]:
    """A model whose gradient waits, and one with the plain head and the same numbers."""
    end = "tied" if tied else "free"
    fast, plain = make_head(f"sorted_{end}", layout)[1], make_head(f"looped_{end}", layout, seed=1)[1]
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def batch(layout: Layout) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(layout.vocabulary_size, (2, NUM_ROWS), generator=generator)
    tokens[1, ::5] = IGNORE_INDEX
    return tokens[0], tokens[1]


def loss_of(model: Model, tokens: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = model.head.loss(model.embedding(tokens).tanh(), targets).loss
    return loss


def assert_same_gradients(fast: nn.Module, plain: nn.Module, times: float = 1.0) -> None:
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad * times, rtol=1e-10, atol=1e-12)


@every_layout
@every_tie
def test_every_way_of_going_backward(layout: Layout, tied: bool, late_calls: list[str]) -> None:
    fast, plain = twins(layout, tied)
    tokens, targets = batch(layout)
    for model in (fast, plain):
        (3 * loss_of(model, tokens, targets)).backward()
    assert late_calls == ["head"]
    assert_same_gradients(fast, plain)

    loss_of(fast, tokens, targets).mul(3).backward()  # accumulation
    assert_same_gradients(fast, plain, times=2)
    fast.zero_grad(set_to_none=False)  # into zeros that are there already
    loss = loss_of(fast, tokens, targets)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    assert_same_gradients(fast, plain)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()

    weight, expected = fast.head.scorer.weight, plain.head.scorer.weight  # type: ignore[union-attr]
    before = weight.grad.clone()
    (alone,) = torch.autograd.grad(3 * loss_of(fast, tokens, targets), [weight])
    torch.testing.assert_close(alone, expected.grad, rtol=1e-10, atol=1e-12)
    assert torch.equal(weight.grad, before)


@every_layout
def test_it_comes_after_everything_else_and_once(layout: Layout, late_calls: list[str]) -> None:
    """After the embedding's own gradient, when no activation is left; hooks see the sum of both, once."""
    fast, plain = twins(layout, tied=True)
    tokens, targets = batch(layout)
    loss_of(plain, tokens, targets).backward()
    seen: list[Tensor] = []
    fast.embedding.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    fast.embedding.weight.register_post_accumulate_grad_hook(lambda _: late_calls.append("stored"))
    embedded = fast.embedding(tokens)
    embedded.register_hook(lambda _: late_calls.append("backbone"))
    fast.head.loss(embedded.tanh(), targets).loss.backward()
    assert late_calls == ["backbone", "head", "stored"]
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], plain.embedding.weight.grad, rtol=1e-10, atol=1e-12)


@every_layout
def test_two_losses_in_one_graph(layout: Layout) -> None:
    fast, plain = twins(layout, tied=True)
    tokens, targets = batch(layout)
    for model in (fast, plain):
        (loss_of(model, tokens, targets) - 0.3 * loss_of(model, tokens.flip(0), targets)).backward()
    assert_same_gradients(fast, plain)


@every_layout
@every_tie
def test_nothing_to_learn_from(layout: Layout, tied: bool) -> None:
    for num_rows in (0, 5):
        fast, _ = twins(layout, tied)
        targets = torch.full((num_rows,), IGNORE_INDEX)
        fast.head.loss(make_hidden(num_rows).requires_grad_(), targets).loss.backward()
        gradient = fast.head.scorer.weight.grad  # type: ignore[union-attr]
        assert gradient is not None and not gradient.any()


@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_with_a_scaled_loss(layout: Layout, dtype: torch.dtype) -> None:
    fast, plain = (model.float() for model in twins(layout, tied=True))
    tokens, targets = batch(layout)
    scale = 2.0**16
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(fast, tokens, targets)
    (scale * loss).backward()
    loss_of(plain, tokens, targets).backward()
    found, expected = fast.embedding.weight.grad, plain.embedding.weight.grad
    assert found is not None and expected is not None and found.dtype == torch.float32
    assert (found / scale - expected).norm() <= 0.03 * expected.norm()


class _Loss(nn.Module):
    """What DistributedDataParallel can call."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return loss_of(self.model, tokens, targets)


def test_data_parallel_sees_the_whole_gradient() -> None:
    """Its communication starts when a gradient is stored; one that was added to later would not be averaged."""
    layout = LAYOUTS[1]
    fast, plain = twins(layout, tied=True)
    tokens, targets = batch(layout)
    loss_of(plain, tokens, targets).backward()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(_Loss(fast))
        sent: list[Tensor] = []

        def send(_, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations and knows no strings
            sent.append(bucket.buffer().clone())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel.register_comm_hook(None, send)
        for _ in range(2):  # buckets are put in another order after the first step
            fast.zero_grad(set_to_none=True)
            sent.clear()
            parallel(tokens, targets).backward()
            assert_same_gradients(fast, plain)
            total = sum(float(buffer.square().sum()) for buffer in sent)
            expected = sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None)
            assert total == pytest.approx(expected, rel=1e-9)
    finally:
        distributed.destroy_process_group()


def test_a_gradient_smaller_than_its_slopes_does_not_wait(late_calls: list[str]) -> None:
    layout = Layout(30, 15)
    fast, plain = twins(layout, tied=True)
    tokens, targets = batch(layout)
    assert layout.vocabulary_size * HIDDEN_SIZE <= NUM_ROWS * HIDDEN_SIZE
    for model in (fast, plain):
        loss_of(model, tokens, targets).backward()
    assert late_calls == []
    assert_same_gradients(fast, plain)
