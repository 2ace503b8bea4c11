"""Training as CUDA runs it, on a CPU: nothing that makes the host wait, no shape that depends on a value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from head_cases import FULL_KINDS, HIDDEN_SIZE, KINDS, LAYOUTS, Layout, make_head, make_hidden, one_case_a_kind
from vocabfold.heads import SortedLinearScorer, equal_partition, kernels
from vocabfold.heads.base import Head
from vocabfold.heads.nested import NestedFoldedHead
from vocabfold.measure.flops import count_flops
from vocabfold.tokens import IGNORE_INDEX

NESTED = "nested"
CAPTURABLE = [kind for kind in (*KINDS, NESTED) if not kind.startswith(("chunked", "looped", "adaptive", "mixture"))]
# What asks the device for values, or makes tensors whose sizes depend on them.
WAITING = (
    "_local_scalar_dense",
    "bincount",
    "equal",
    "item",
    "is_nonzero",
    "lift_fresh",  # a tensor of host numbers, which would be copied there
    "masked_scatter",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "repeat_interleave",
    "unique",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
)


class NothingWaits(TorchDispatchMode):
    """Raises on an operation that would make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in WAITING, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FIXED_DEVICES", ("cuda", "cpu"))


def made(kind: str, layout: Layout) -> tuple[Head, torch.nn.Module]:
    if kind != NESTED:
        return make_head(kind, layout)
    torch.manual_seed(0)
    partition = equal_partition(layout.vocabulary_size, layout.group_size, layout.order(), layout.shortlist)
    scorer = SortedLinearScorer(HIDDEN_SIZE, partition)
    head = NestedFoldedHead(HIDDEN_SIZE, partition, scorer, with_bias=True).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return head, head


def trained(head: Head, model: torch.nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Any, list[Tensor]]:
    result = head.loss(hidden, targets, with_accuracy=True)
    inputs = [hidden, *model.parameters()]
    return result, list(torch.autograd.grad(3 * result.loss, inputs, allow_unused=True, materialize_grads=True))


@one_case_a_kind(LAYOUTS, kinds=CAPTURABLE)
def test_same_numbers_without_waiting(kind: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    head, model = made(kind, layout)
    assert head.capturable
    targets = torch.randint(layout.vocabulary_size, (40,), generator=torch.Generator().manual_seed(7))
    targets[::5] = IGNORE_INDEX
    for given in (targets, torch.full((3,), IGNORE_INDEX), targets[:0]):
        hidden = make_hidden(len(given)).requires_grad_()
        expected, expected_gradients = trained(head, model, hidden, given)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "FIXED_DEVICES", ("cuda", "cpu"))
            patch.setattr(kernels, "FIXED_CHUNK_ELEMENTS", 1)
            patch.setattr(kernels, "FEWEST_ROWS", 23)
            patch.setattr(Tensor, "tolist", None)  # which reads the memory of a CPU without an operation
            with NothingWaits():
                found, found_gradients = trained(head, model, hidden, given)
            log_prob = head.target_log_prob(hidden, given)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.parts, expected.parts, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(log_prob, head.target_log_prob(hidden, given), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", CAPTURABLE)
def test_shapes_are_known_without_values(kind: str) -> None:
    """Tensors without numbers refuse whatever depends on them."""
    head, model = made(kind, LAYOUTS["shortlist"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(30, HIDDEN_SIZE, dtype=torch.float64, requires_grad=True)
        _, gradients = trained(head, model, hidden, torch.zeros(30, dtype=torch.int64))
    assert [gradient.shape for gradient in gradients] == [hidden.shape, *(p.shape for p in model.parameters())]


@pytest.mark.usefixtures("on_device")
def test_a_mixture_of_capturable_parts_waits_for_nothing() -> None:
    head, model = make_head("mixture_free", LAYOUTS["shortlist"])
    assert not head.capturable  # one of its parts is the loop over the groups
    assert hasattr(head, "parts")
    head.parts[1] = copy.deepcopy(head.parts[0])
    assert head.capturable
    with NothingWaits():
        trained(head, model, make_hidden(30).requires_grad_(), torch.arange(30))


def test_heads_of_others_are_not_said_to_be_capturable() -> None:
    for kind in ("chunked_tied", "adaptive", "looped_free", "looped_tied"):
        assert not make_head(kind, LAYOUTS["prime"])[0].capturable


def test_the_guard_sees_what_waits() -> None:
    numbers = torch.arange(4)
    for waiting in (
        lambda: numbers.sum().item(),
        lambda: numbers.nonzero(),
        lambda: numbers[numbers > 1],
        lambda: numbers.unique(),
        lambda: numbers.bincount(),
        lambda: torch.tensor([1, 2]),
        lambda: numbers.repeat_interleave(numbers),
        lambda: bool(numbers[0]),
    ):
        with pytest.raises(AssertionError), NothingWaits():
            waiting()


def test_operations_are_counted_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    head, model = made("sorted_free", LAYOUTS["shortlist"])
    hidden = make_hidden(40).requires_grad_()
    targets = torch.randint(head.vocabulary_size, (40,), generator=torch.Generator().manual_seed(7))
    counted = count_flops(lambda: trained(head, model, hidden, targets))
    monkeypatch.setattr(kernels, "FIXED_DEVICES", ("cuda", "cpu"))
    assert count_flops(lambda: trained(head, model, hidden, targets)) == counted > 0


@one_case_a_kind(LAYOUTS, kinds=[kind for kind in CAPTURABLE if kind not in FULL_KINDS])
def test_whole_rows_are_those_that_visits_find(kind: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = made(kind, layout)
    hidden = make_hidden(9)
    expected, k = head.log_prob(hidden), min(4, layout.vocabulary_size)
    best = head.topk(hidden, k)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "FIXED_DEVICES", ("cuda", "cpu"))
        patch.setattr("vocabfold.heads.folded.FIXED_CHUNK_ELEMENTS", 4 * layout.vocabulary_size)
        patch.setattr("vocabfold.heads.linear.FIXED_CHUNK_ELEMENTS", 1)
        with torch.no_grad():
            torch.testing.assert_close(head.log_prob(hidden), expected, rtol=1e-12, atol=1e-12)
        found = head.topk(hidden, k)
        torch.testing.assert_close(found[0], best[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(found[1], best[1])
        assert torch.equal(head.sample(hidden, temperature=0), best[1][:, 0])
        drawn = head.sample(hidden, top_k=k, generator=torch.Generator().manual_seed(1))
        assert (drawn[:, None] == best[1]).any(dim=-1).all()
        assert head.sample(hidden[:0], top_p=0.5).shape == (0,)
