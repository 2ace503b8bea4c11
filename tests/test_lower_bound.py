"""Lower bounds of a head's time, and timings in another process."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from experiments.study.lower_bound import least_bytes, products_of
from experiments.study.other_process import OtherProcess

from vocabfold.errors import UserError

CPU = torch.device("cpu")


def test_products_of_a_step_by_hand() -> None:
    hidden, weight = torch.randn(10, 20), torch.randn(30, 20)

    def step() -> None:
        logits = hidden @ weight.t()
        logits.addmm_(hidden, weight.t())
        torch.mm(logits, weight, out=torch.empty(10, 20))
        logits.exp()

    products = products_of(step, CPU)
    assert products.flops == 3 * 2 * 10 * 20 * 30
    assert products.seconds > 0


def test_least_bytes_reads_the_rows_that_were_used() -> None:
    weight = torch.zeros(7, 3, requires_grad=True)
    weight[torch.tensor([1, 4, 4])].sum().backward()
    unused = torch.zeros(5, requires_grad=True)
    assert least_bytes([weight, unused]) == (7 + 2) * 3 * 4


def calls(value: int) -> dict[str, Callable[[], int]]:
    def fail() -> int:
        raise UserError("no such luck")

    return {"twice": lambda: 2 * value, "process": os.getpid, "fail": fail, "end": lambda: os._exit(3)}


def test_calls_in_another_process() -> None:
    with OtherProcess(calls, 21) as other:
        assert other.call("twice") == 42
        assert other.call("process") != os.getpid()
        with pytest.raises(UserError, match="no such luck"):
            other.call("fail")
        assert other.call("twice") == 42
        with pytest.raises(UserError, match="has ended"):
            other.call("end")
