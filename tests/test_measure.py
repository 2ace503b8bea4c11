from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.measure.memory import live_tensors, peak_memory_of
from vocabfold.measure.simulate import TrainingParts, simulated_peak_memory

CPU = torch.device("cpu")
FLOAT_BYTES = 4


class Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv, self.out = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        parts = self.qkv(self.norm_attention(x)).view(batch, sequence, 3, self.num_heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, hidden))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden_size)
        self.blocks = nn.Sequential(*(Block(hidden_size, num_heads=2) for _ in range(num_layers)))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.blocks(self.embedding(tokens)) @ self.embedding.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_step(optimizer: torch.optim.Optimizer, compute_loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute_loss().backward()
        optimizer.step()

    return step


def measured_peak(parts: TrainingParts, batch: tuple[Tensor, ...] = ()) -> int:
    module, optimizer, compute_loss = parts
    step = training_step(optimizer, compute_loss)
    step()
    return peak_memory_of(step, CPU, [*live_tensors(module, optimizer), *batch]).peak_bytes


def test_peak_counts_forward_backward_and_freed_temporaries_to_the_byte() -> None:
    rows, inner, columns = 1000, 64, 128
    x, w = torch.randn(rows, inner), torch.randn(inner, columns, requires_grad=True)
    product, live = rows * columns * FLOAT_BYTES, (rows * inner + inner * columns) * FLOAT_BYTES

    def forward() -> None:
        x @ w

    def freed_in_between() -> None:
        for _ in range(3):
            (x @ w).detach().exp()

    def backward_of_temporaries() -> None:
        (x @ w).exp().sum().backward()
        w.grad = None

    def backward_of_named() -> None:
        y = x @ w
        z = y.exp()
        z.sum().backward()
        w.grad = None

    measured = peak_memory_of(forward, CPU, [x, w, w.t()])
    assert (measured.live_bytes_before, measured.peak_bytes) == (live, live + product)
    assert measured.reserved_bytes is None
    assert peak_memory_of(freed_in_between, CPU, [x, w]).peak_bytes == live + 2 * product
    # exp keeps only its result: two products at a time, with the loss and its gradient (one scalar each).
    assert peak_memory_of(backward_of_temporaries, CPU, [x, w]).peak_bytes == live + 2 * product + 2 * FLOAT_BYTES
    # With both names alive, their gradient makes the third product, and w's own gradient comes on top.
    named = live + 3 * product + 2 * FLOAT_BYTES + inner * columns * FLOAT_BYTES
    assert peak_memory_of(backward_of_named, CPU, [x, w]).peak_bytes == named


def test_peak_sees_temporaries_inside_an_operator() -> None:
    logits = torch.randn(100, 1000)
    # logsumexp builds the shifted exponentials of the whole input, a dispatch mode sees only its [100] result.
    assert peak_memory_of(lambda: logits.logsumexp(-1), CPU).peak_bytes >= logits.numel() * FLOAT_BYTES
    with pytest.raises(UserError, match="use cpu or cuda"):
        peak_memory_of(lambda: None, torch.device("meta"))


def test_peak_subtracts_what_the_step_releases_and_ignores_what_was_not_live() -> None:
    module = nn.Linear(1000, 100, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    weight = module.weight.numel() * FLOAT_BYTES
    module(torch.ones(1, 1000)).sum().backward()

    def release_then_allocate() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.empty_like(module.weight)

    measured = peak_memory_of(release_then_allocate, CPU, live_tensors(module, optimizer))
    assert (measured.live_bytes_before, measured.peak_bytes) == (2 * weight, 2 * weight)

    unlisted = [torch.empty(10_000)]

    def drop_unlisted() -> None:
        unlisted.clear()
        torch.empty(5_000)

    assert peak_memory_of(drop_unlisted, CPU).peak_bytes == 5_000 * FLOAT_BYTES


def test_live_tensors_counts_tied_weights_once_and_finds_optimizer_state() -> None:
    module = LanguageModel(vocabulary=50, hidden_size=8, num_layers=1)
    optimizer = torch.optim.Adam(module.parameters())
    tokens = torch.randint(50, (2, 4))
    training_step(optimizer, lambda: module(tokens, tokens))()
    parameters = sum(p.numel() for p in module.parameters())
    step_counters = len(list(module.parameters()))
    before = peak_memory_of(lambda: None, CPU, live_tensors(module, optimizer)).live_bytes_before
    assert before == (4 * parameters + step_counters) * FLOAT_BYTES


def test_process_high_water_mark_follows_memory() -> None:
    measured = peak_memory_of(lambda: torch.ones(20_000_000), CPU)
    if measured.process_high_water_bytes is None:
        pytest.skip("this system does not tell")
    assert measured.process_high_water_bytes > measured.peak_bytes == 20_000_000 * FLOAT_BYTES


@pytest.mark.parametrize(("vocabulary", "hidden_size", "sequence"), [(5_000, 64, 128), (3_001, 96, 64), (50, 64, 512)])
def test_simulated_peak_is_the_measured_peak(vocabulary: int, hidden_size: int, sequence: int) -> None:
    batches: list[Tensor] = []

    def build() -> TrainingParts:
        module = LanguageModel(vocabulary, hidden_size, num_layers=2)
        tokens = torch.randint(vocabulary, (1_024 // sequence, sequence))
        batches.append(tokens)
        return module, torch.optim.Adam(module.parameters()), lambda: module(tokens, tokens)

    simulated = simulated_peak_memory(build)
    parts = build()
    assert simulated.peak_bytes == pytest.approx(measured_peak(parts, (batches[-1],)), rel=0.01)
    parameter_bytes = sum(p.numel() for p in parts[0].parameters()) * FLOAT_BYTES
    step_counters = len(list(parts[0].parameters()))
    assert simulated.parameter_bytes == parameter_bytes
    assert simulated.optimizer_state_bytes == 2 * parameter_bytes + step_counters * FLOAT_BYTES
    if vocabulary == 5_000:
        assert simulated.activation_bytes > 3 * 1_024 * vocabulary * FLOAT_BYTES


class SoftmaxLoss(torch.autograd.Function):
    """Mean of logsumexp(h w^T), gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        value = logits.logsumexp(-1).mean()
        grad = logits.softmax(-1).div_(len(hidden))
        ctx.save_for_backward(grad @ weight, grad.t() @ hidden)
        return value

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grads[0] * saved for saved in ctx.saved_tensors)  # type: ignore[attr-defined]


def loop_over_groups(hidden: Tensor, weight: Tensor) -> Tensor:
    """Reads integer values: shapes depend on which rows a group has."""
    groups = torch.arange(len(hidden)) % 3
    total = hidden.new_zeros(())
    for group in groups.unique().tolist():
        members = (groups == group).nonzero().squeeze(-1)
        total = total + (hidden[members] @ weight.t()).logsumexp(-1).sum()
    return total


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autograd_function": SoftmaxLoss.apply,
    "logsumexp": lambda h, w: (h @ w.t()).logsumexp(-1).mean(),
    "gather": lambda h, w: (h @ w.t()).log_softmax(-1).gather(1, torch.zeros(len(h), 1, dtype=torch.long)).mean(),
    "gather_parameter": lambda h, w: w.gather(1, torch.zeros(len(w), 1, dtype=torch.long)).mean() + h.mean(),
    "index": lambda h, w: w[torch.randint(len(w), (len(h),))].mul(h).mean(),
    "index_select": lambda h, w: w.index_select(0, torch.randint(len(w), (len(h),))).mul(h).mean(),
    "topk": lambda h, w: (h @ w.t()).topk(5).values.mean(),
    "used_twice": lambda h, w: (w * 2).sin().sum() + w.cos().sum() + w.exp().mul(h.sum()).sum(),
    "loop_over_groups": lambda h, w: loop_over_groups(h, w),
    "in_place_view": lambda h, w: (h @ w.t()).view(-1, 7).mul_(2).masked_fill(torch.ones(7, dtype=torch.bool), 0).sum(),
    "linear_bf16": lambda h, w: F.cross_entropy(F.linear(h.bfloat16(), w.bfloat16()), torch.zeros(len(h)).long()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_simulation_handles_what_heads_are_made_of(name: str) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.weight = nn.Parameter(torch.randn(256, 64)), nn.Parameter(torch.randn(1_400, 64))

    def build() -> TrainingParts:
        module = Parts()
        return module, torch.optim.SGD(module.parameters()), lambda: LOSSES[name](module.hidden, module.weight)

    random_state = torch.get_rng_state()
    simulated = simulated_peak_memory(build)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert simulated.peak_bytes == pytest.approx(measured_peak(build()), rel=0.01)


def test_simulation_runs_at_a_size_that_no_machine_holds_and_does_not_build_attention_squares() -> None:
    def build() -> TrainingParts:
        module = LanguageModel(vocabulary=1_000, hidden_size=64, num_layers=1)
        tokens = torch.zeros(512, 16_384, dtype=torch.long)
        return module, torch.optim.Adam(module.parameters()), lambda: module(tokens, tokens)

    peak = simulated_peak_memory(build).peak_bytes
    logits = 512 * 16_384 * 1_000 * FLOAT_BYTES
    assert 3 * logits < peak < 4.5 * logits < 512 * 2 * 16_384**2 * FLOAT_BYTES


@pytest.mark.parametrize(
    "reads_values", [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero() * x[0]]
)
def test_simulation_refuses_a_step_that_reads_values(reads_values: Callable[[Tensor], Tensor]) -> None:
    def build() -> TrainingParts:
        module = nn.Linear(3, 3)
        return module, torch.optim.SGD(module.parameters()), lambda: reads_values(module.weight[0]).sum()

    with pytest.raises(UserError, match="reads floating point values"):
        simulated_peak_memory(build)
