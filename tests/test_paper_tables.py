"""The models of Tables 2 and 3: what is simulated is what is measured, and the published counts come out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experiments.paper.paper_code import PaperSizes, PostNormGrouped, sinusoidal_positions
from experiments.paper.paper_tables import Case
from torch import nn

from vocabfold.measure.flops import count_flops_by_operator
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.simulate import simulated_peak_memory, tensors_without_data

SMALL = Case("lean", "gpt2", 32, batch_size=2, sequence_length=96, vocabulary_size=1_999, num_layers=2, num_heads=2)
FIVE_SIZES = [
    SMALL,
    replace(SMALL, hidden_size=64),
    replace(SMALL, batch_size=5),
    replace(SMALL, sequence_length=320),
    replace(SMALL, num_layers=4, vocabulary_size=499),
]
QUICK = replace(SMALL, vocabulary_size=499)
ARMS = [
    ("lean", "gpt2"),
    ("lean", "gpt_neo"),
    ("lean", "grouped"),
    ("paper_code", "gpt2"),
    ("paper_code", "gpt_neo"),
    ("paper_code", "grouped"),
    ("paper_code_unfused", "gpt2"),
    ("paper_code_unfused", "grouped"),
]


def measured_peak(case: Case) -> int:
    module, optimizer, loss = case.build()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    step()
    batch = [cell.cell_contents for cell in loss.__closure__ or () if isinstance(cell.cell_contents, torch.Tensor)]
    return peak_memory_of(step, torch.device("cpu"), [*live_tensors(module, optimizer), *batch]).peak_bytes


@pytest.mark.parametrize("sizes", [[QUICK], pytest.param(FIVE_SIZES, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("setting", "model"), ARMS)
def test_simulated_memory_is_the_measured_memory(setting: str, model: str, sizes: list[Case]) -> None:
    if setting != "lean" and model != "grouped":
        pytest.importorskip("transformers")
    for size in sizes:
        case = replace(size, setting=setting, model=model)
        assert simulated_peak_memory(case.build).peak_bytes == pytest.approx(measured_peak(case), rel=0.03), case


def test_what_the_forward_pass_keeps_is_told_apart() -> None:
    rows, columns = 100, 50

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(rows, columns))

    def build() -> tuple[nn.Module, torch.optim.Optimizer, object]:
        module = Squares()
        # exp keeps its result for the backward pass; the gradient that arrives there is temporary.
        return module, torch.optim.SGD(module.parameters()), lambda: module.weight.exp().square().sum()

    memory = simulated_peak_memory(build)  # type: ignore[arg-type]
    one = rows * columns * 4
    assert memory.kept_activation_bytes == pytest.approx(one, rel=0.01)  # square's input and exp's result are the same
    assert memory.activation_bytes - memory.kept_activation_bytes >= one
    parts = memory.parameter_bytes + memory.buffer_bytes + memory.gradient_bytes + memory.optimizer_state_bytes
    assert parts + memory.activation_bytes == memory.peak_bytes


@pytest.mark.parametrize(
    ("model", "hidden_size", "gmacs"),
    [
        ("gpt2", 128, 4.10),
        ("gpt_neo", 128, 4.64),
        ("grouped", 128, 0.83),
        ("grouped", 256, 3.28),
        ("grouped", 1024, 51.8),
        ("gpt_neo", 1024, 82.2),
    ],
)
def test_the_published_counts_come_out_of_their_rule(model: str, hidden_size: int, gmacs: float) -> None:
    with tensors_without_data():
        _, _, loss = Case("lean", model, hidden_size, batch_size=1).build()
        flops = count_flops_by_operator(loss)
    attention = sum(value for name, value in flops.items() if "scaled_dot_product" in name or "bmm" in name)
    counted = sum(flops.values()) - (0 if model == "gpt_neo" else attention)
    assert counted / 2e9 == pytest.approx(gmacs, abs=0.006 if gmacs < 10 else 0.06)
    assert attention == 8 * 2 * 2 * 512 * 512 * hidden_size


def test_the_papers_encoder_looks_at_no_later_token() -> None:
    torch.manual_seed(0)
    model = PostNormGrouped(PaperSizes(16, 97, 2, 2, 12), fused=True).eval()
    tokens = torch.randint(97, (1, 12))
    changed = tokens.clone()
    changed[0, -2:] = (changed[0, -2:] + 1) % 97
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(tokens), model(changed)
    torch.testing.assert_close(seen[0][:10], seen[1][:10])
    assert not torch.allclose(seen[0][10], seen[1][10])
    table = sinusoidal_positions(50, 16)
    torch.testing.assert_close(table[:, 0::2] ** 2 + table[:, 1::2] ** 2, torch.ones(50, 8))
    torch.testing.assert_close(
        table[7, :2], torch.tensor([7.0]).sin().repeat(2).where(torch.tensor([True, False]), torch.tensor(7.0).cos())
    )
