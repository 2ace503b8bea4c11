"""Captured training steps without a GPU: what is asked of torch.cuda is pretended, and what is counted and copied is
not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from vocabfold.runs.capture import CALLS_BEFORE_CAPTURE, CapturedStep


class PretendedGraph:
    """Of torch.cuda: ``again`` is what the last capture recorded."""

    def replay(self) -> None:
        again(self)


captured: CapturedStep
calls: list[bool]


def step(inputs: tuple[Tensor, ...], variant: bool) -> dict[str, Tensor]:
    calls.append(variant)
    return {"sum": (inputs[0] + inputs[1]).sum(), "variant": torch.tensor(float(variant))}


def again(graph: PretendedGraph) -> None:
    """Compute what was captured on the tensors that it was captured with, into those that it left."""
    ((variant, numbers),) = [(name, kept[2]) for name, kept in captured.graphs.items() if kept[0] is graph]
    numbers.copy_(torch.stack([value.double() for value in step(captured.inputs, variant).values()]))
    calls.pop()


def test_the_first_calls_run_then_each_variant_is_captured_once_and_replayed_on_what_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    global captured, calls
    for name in ("empty_cache", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    calls = []
    captured = CapturedStep(step, (torch.empty(2), torch.empty(2)), torch.device("cpu"))
    for number in range(2 * CALLS_BEFORE_CAPTURE):
        for variant in (False, True):
            assert captured((torch.full((2,), number), torch.ones(2)), variant) == {
                "sum": 2.0 * (number + 1),
                "variant": float(variant),
            }
    assert calls == [False, True] * (CALLS_BEFORE_CAPTURE + 1)
