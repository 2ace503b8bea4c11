"""Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from head_cases import LAYOUTS, Layout, every_pair, make_head, make_hidden
from vocabfold.heads import equal_partition, kernels
from vocabfold.heads.kernels import Late, Rows
from vocabfold.heads.linear_kernel import LinearKernel
from vocabfold.heads.linear_triton import TritonLinearKernel
from vocabfold.heads.scorers import SortedTargets
from vocabfold.heads.softmax_kernel import SoftmaxKernel
from vocabfold.tokens import IGNORE_INDEX

pytest.importorskip("triton", reason="needs triton: pip install -e '.[kernels]' on Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of values and, relative to their norm, of gradients: some roundings of the dtype, 2^-24, 2^-8 and 2^-11.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GROUPED = {name: layout for name, layout in LAYOUTS.items() if layout.group_size != 1} | {
    "more_slots_than_a_tile": Layout(400, 170, shuffled=True, shortlist=3)
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways in which that of Triton 3.6 differs from Triton: it takes int() of an array of one number for the end of
    a loop, which NumPy 2.4 no longer allows, and multiplies bfloat16 numbers by their bits."""
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, first, second, *rest: dot(self, widened(first), widened(second), *rest),
    )


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(kernels, "TRITON_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(kernels, "FIXED_DEVICES", ("cuda", "cpu"))
    found = kernels.triton_kernels(torch.float32, (torch.empty(0, device=DEVICE),))
    assert found is not None
    return found


def rounded(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Numbers that ``dtype`` holds exactly, as float64 on the CPU: what is compared is the computing alone."""
    return (scale * torch.randn(*shape)).to(dtype).double()


def on_device(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(DEVICE, dtype if tensor.is_floating_point() else tensor.dtype)


def made(rows: Rows, factor: float) -> list[Tensor]:
    """``factor`` times the gradients, those that wait included."""
    gradients = []
    for gradient in rows.gradients:
        assert gradient is not None
        if isinstance(gradient, Late):
            gradients.append(gradient.compute(torch.tensor(factor, device=DEVICE), *gradient.tensors))
        else:
            gradients.append(gradient * factor)
    return [gradient.double().cpu() for gradient in gradients]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert (one - other).norm() <= tolerance * max(1.0, float(other.norm()))


def softmax_reference(inputs: list[Tensor], targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """log P [N], whether the target is the likeliest, and the gradients of the weighted sum."""
    hidden, weight, *bias = (tensor.detach().requires_grad_() for tensor in inputs)
    logits = torch.nn.functional.linear(hidden, weight, *bias)
    log_prob = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    gradients = torch.autograd.grad((weights * log_prob).sum(), [hidden, weight, *bias])
    return log_prob.detach(), logits.argmax(-1) == targets, list(gradients)


@pytest.mark.parametrize(
    ("num_choices", "dtype", "given"), every_pair([1, 5, 97, 300], list(TOLERANCES), ["mixed", "half"])
)
def test_softmax(num_choices: int, dtype: torch.dtype, given: str) -> None:
    torch.manual_seed(num_choices)
    num_rows, hidden_size = 23, 13
    inputs = [
        rounded(num_rows, hidden_size, dtype=dtype),
        rounded(num_choices, hidden_size, dtype=dtype, scale=0.5),
        rounded(num_choices, dtype=dtype),
    ]
    targets, counted = torch.randint(num_choices, (num_rows,)), torch.rand(num_rows) < 0.7
    for biases in (1, 0):
        some = inputs[: 2 + biases]
        log_prob, hits, gradients = softmax_reference(some, targets, counted.double())
        kernel = SoftmaxKernel(targets.to(DEVICE), counted.to(DEVICE), dtype)
        tensors = tuple(on_device(tensor, dtype if given == "half" else torch.float32) for tensor in some)
        rows = kernel(tensors, None, [True] * len(some), True)
        # Logits are rounded to the dtype of products.
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(rows.log_prob.double().cpu(), log_prob * counted, rtol=0, atol=4 * tolerance)
        assert rows.hits is not None
        if dtype == torch.float32:
            assert torch.equal(rows.hits.cpu(), hits & counted)
        assert_near(made(rows, 0.5), [0.5 * gradient for gradient in gradients], tolerance)


@pytest.mark.parametrize(
    ("layout", "dtype", "tied"), every_pair(GROUPED, list(TOLERANCES), {"free": False, "tied": True})
)
def test_linear_scorer(layout: Layout, dtype: torch.dtype, tied: bool, module: ModuleType) -> None:
    torch.manual_seed(0)
    partition = equal_partition(layout.vocabulary_size, layout.group_size, layout.order(), layout.shortlist)
    num_tokens, num_rows, hidden_size = len(partition.multi_tokens), 90, 37
    inputs = (
        rounded(num_rows, hidden_size, dtype=dtype),
        rounded(layout.vocabulary_size if tied else num_tokens, hidden_size, dtype=dtype, scale=0.3),
        rounded(num_tokens, dtype=dtype),
    )
    # Most rows in few groups, so that one has more rows than a tile and others have none.
    tokens = (torch.rand(num_rows) ** 4 * layout.vocabulary_size).long()
    rows = (partition.group_of[tokens], partition.slot_of[tokens], torch.rand(num_rows) < 0.8)
    plain = LinearKernel(partition, SortedTargets(partition, *rows, fixed=False), tied, torch.float64)
    partition_there = equal_partition(layout.vocabulary_size, layout.group_size, layout.order(), layout.shortlist)
    partition_there.to(DEVICE)
    targets = SortedTargets(partition_there, *(tensor.to(DEVICE) for tensor in rows))
    kernel = TritonLinearKernel(module, partition_there, targets, tied, dtype)
    tolerance = TOLERANCES[dtype]
    for weights, given in ((None, torch.float32), (rounded(num_rows, dtype=dtype), dtype)):
        expected = plain(inputs, weights, [True] * 3, True)
        tensors = tuple(on_device(tensor, given) for tensor in inputs)
        there = None if weights is None else on_device(weights, torch.float32)
        found = kernel(tensors, there, [True] * 3, True)
        torch.testing.assert_close(found.log_prob.double().cpu(), expected.log_prob, rtol=0, atol=2e-5)
        assert found.hits is not None and expected.hits is not None
        assert torch.equal(found.hits.cpu(), expected.hits)
        wanted = [gradient for gradient in expected.gradients if isinstance(gradient, Tensor)]
        if len(wanted) < 3:  # one that waits in the reference as well
            late = expected.gradients[1]
            assert isinstance(late, Late)
            wanted.insert(1, late.compute(torch.tensor(1.0), *late.tensors))
        assert_near(made(found, 3.0), [3.0 * gradient for gradient in wanted], tolerance)
        without = kernel(tensors, there, [False] * 3, False)
        assert without.hits is None and without.gradients == [None] * 3
        # compiled apart, they may round apart
        torch.testing.assert_close(without.log_prob, found.log_prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_nothing_counts(num_rows: int, module: ModuleType) -> None:
    partition = equal_partition(50, 7).to(DEVICE)
    zeros = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    targets = SortedTargets(partition, zeros, zeros, zeros > 0)
    kernel = TritonLinearKernel(module, partition, targets, False, torch.float32)
    inputs = tuple(torch.ones(*shape, device=DEVICE) for shape in ((num_rows, 5), (50, 5), (50,)))
    rows = kernel(inputs, None, [True] * 3, True)
    assert rows.hits is not None and not rows.hits.any()
    assert rows.log_prob.shape == (num_rows,) and not rows.log_prob.any()
    for gradient, given in zip(made(rows, 1.0), inputs, strict=True):
        assert gradient.shape == given.shape and not gradient.any()


@pytest.mark.parametrize("kind", ["scale_shift_sorted", "low_rank_sorted", "sorted_free_bias", "sorted_tied"])
def test_heads(kind: str) -> None:
    """A whole loss through kernels, of scorers that have none of their own too."""
    layout = LAYOUTS["shortlist"]
    _, exact = make_head(kind, layout)
    there = copy.deepcopy(exact).float().to(DEVICE)
    targets = torch.arange(60) % layout.vocabulary_size
    targets[::5] = IGNORE_INDEX
    hidden = make_hidden(len(targets)).requires_grad_()
    given = hidden.detach().float().to(DEVICE).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "TRITON_DEVICES", ())
        patch.setattr(kernels, "FIXED_DEVICES", ())
        expected = exact.head.loss(hidden, targets, with_accuracy=True)
        gradients = torch.autograd.grad(expected.loss, [hidden, *exact.parameters()], materialize_grads=True)
    found = there.head.loss(given, targets.to(DEVICE), with_accuracy=True)
    torch.testing.assert_close(found.loss.double().cpu(), expected.loss, rtol=1e-6, atol=1e-6)
    for name, part in expected.parts.items():
        torch.testing.assert_close(found.parts[name].double().cpu(), part.double(), rtol=1e-6, atol=1e-6)
    found_gradients = torch.autograd.grad(found.loss, [given, *there.parameters()], materialize_grads=True)
    assert_near([gradient.double().cpu() for gradient in found_gradients], list(gradients), 5e-6)
