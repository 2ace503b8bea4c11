"""Small networks before the scores, computed a chunk of rows at a time: same numbers, nothing as wide as they kept."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from head_cases import HIDDEN_SIZE, LAYOUTS, Layout, Model, make_head, make_hidden
from vocabfold.heads import ConditionedLinearScorer, FoldedHead, equal_partition, kernels
from vocabfold.heads.readers import ResidualReader, WideReader
from vocabfold.tokens import IGNORE_INDEX

KINDS = (
    "conditioned_free",
    "conditioned_tied",
    "conditioned_free_gated",
    "conditioned_free_shared",
    "conditioned_free_wide",
    "sorted_free_residual",
)
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, layout: Layout) -> Model:
    """One whose networks, which begin as 0, say something."""
    _, model = make_head(kind, layout)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def batch(layout: Layout, num_rows: int = 23) -> tuple[Tensor, Tensor]:
    targets = torch.randint(layout.vocabulary_size, (num_rows,), generator=torch.Generator().manual_seed(7))
    targets[::5] = IGNORE_INDEX
    return make_hidden(num_rows).requires_grad_(), targets


@every_kind
@pytest.mark.parametrize("rows_a_chunk", [4, 100])
def test_gradients_are_those_of_all_log_probabilities(
    kind: str, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(kernels, "FEWEST_ROWS", rows_a_chunk)
    for name, layout in LAYOUTS.items():
        model, (hidden, targets) = model_of(kind, layout), batch(layout)
        inputs = [hidden, *model.parameters()]
        result = model.head.loss(hidden, targets, with_accuracy=True)
        expected = F.nll_loss(model.head.log_prob(hidden), targets, ignore_index=IGNORE_INDEX)
        found_gradients, expected_gradients = (
            torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            for loss in (result.loss, expected)
        )
        torch.testing.assert_close(
            result.loss, expected, rtol=1e-12, atol=1e-12, msg=lambda text, at=name: f"{at}: {text}"
        )
        torch.testing.assert_close(
            found_gradients, expected_gradients, rtol=1e-9, atol=1e-12, msg=lambda text, at=name: f"{at}: {text}"
        )
        with torch.no_grad():
            alone = model.head.loss(hidden, targets, with_accuracy=True)
        torch.testing.assert_close(alone.loss, result.loss)
        torch.testing.assert_close(alone.parts, result.parts)


@every_kind
def test_no_targets_and_no_rows(kind: str) -> None:
    layout = LAYOUTS["prime"]
    model = model_of(kind, layout)
    for hidden, targets in ((make_hidden(3), torch.full((3,), IGNORE_INDEX)), (make_hidden(0), torch.empty(0).long())):
        loss = model.head.loss(hidden.requires_grad_(), targets).loss
        grads = torch.autograd.grad(loss, [hidden, *model.parameters()], allow_unused=True, materialize_grads=True)
        assert loss == 0 and not any(grad.count_nonzero() for grad in grads)


@every_kind
def test_a_frozen_network_leaves_the_other_gradients_as_they_are(kind: str) -> None:
    layout = LAYOUTS["prime"]
    model, (hidden, targets) = model_of(kind, layout), batch(layout)
    head = model.head
    assert isinstance(head, FoldedHead)
    (whole,) = torch.autograd.grad(head.loss(hidden, targets).loss, [hidden])
    into = head.group_reader.into if head.group_reader is not None else getattr(head.scorer, "into")  # noqa: B009
    into.requires_grad_(False)
    head.loss(hidden, targets).loss.backward()
    torch.testing.assert_close(hidden.grad, whole)
    assert into.weight.grad is None


def test_a_compiled_model_takes_them_as_they_are() -> None:
    layout = LAYOUTS["shortlist"]
    model, (hidden, targets) = model_of("conditioned_free_wide", layout), batch(layout)
    inputs = [hidden, *model.parameters()]
    expected = model.head.loss(hidden, targets).loss
    found = torch.compile(model.head, backend="eager")(hidden, targets).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found_gradients, expected_gradients = (
        torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (found, expected)
    )
    torch.testing.assert_close(found_gradients, expected_gradients)


@dataclass(eq=False)
class Kept:
    """What autograd holds as long as it keeps a tensor."""

    tensor: Tensor


@pytest.mark.parametrize("reader", [None, WideReader, ResidualReader])
def test_nothing_as_wide_as_the_networks_is_kept(reader: type[WideReader] | type[ResidualReader] | None) -> None:
    partition, num_rows = equal_partition(1021, None, torch.randperm(1021), 60), 20_000
    scorer = ConditionedLinearScorer(HIDDEN_SIZE, partition, width=100)
    head = FoldedHead(HIDDEN_SIZE, partition, scorer, group_reader=reader and reader(HIDDEN_SIZE, 100))
    hidden = torch.randn(num_rows, HIDDEN_SIZE, requires_grad=True)
    packed: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result: Any = head.loss(hidden, torch.arange(num_rows) % 1021)
    kept = [one.tensor.numel() for one in (reference() for reference in packed) if one is not None]
    assert len(kept) < len(packed) and max(kept) == num_rows * HIDDEN_SIZE
    result.loss.backward()
    assert hidden.grad is not None and hidden.grad.count_nonzero()
