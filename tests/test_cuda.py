"""Heads on a GPU: values and gradients against float64 on the CPU, the likeliest tokens, draws, and CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import chi2
from torch import Tensor, nn

from head_cases import Model
from vocabfold.errors import UserError
from vocabfold.heads import FullHead, HeadSettings, PartitionSettings, build_head
from vocabfold.heads.fused import FusedHead
from vocabfold.tokens import IGNORE_INDEX

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that CUDA runs on", allow_module_level=True)

DEVICE = "cuda"
PRESETS = Path(__file__).resolve().parents[1] / "conf" / "head"
VOCABULARY_SIZE, HIDDEN_SIZE, NUM_ROWS = 4001, 40, 300  # a prime, no power of two, no multiple of a tile
MANY = 17  # times these rows, where torch sorts and sums in other ways than for few
WEIGHT_STD = 0.1  # logits of about 1
# Relative to the loss, and to the norm of each gradient. A value passes through some ten roundings of its dtype, to
# 2^-24, 2^-8 or 2^-11, and their errors are as likely up as down: a few of these each, and twice that for comfort.
LOSS_TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
CANCELLED = 0.02  # of the norm of all gradients: one that is smaller is a difference of larger numbers
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def settings_of(name: str) -> HeadSettings:
    """Those of a preset, without Hydra."""
    if name == "three_symbols":
        settings = settings_of("linear_clustered_counts")
        settings.partition.symbols = 3
        return settings
    fields = preset(name)
    return HeadSettings(**{**fields, "partition": PartitionSettings(**fields.get("partition", {}))})


def preset(name: str) -> dict[str, Any]:
    """The numbers of a file and of those that it starts from."""
    given = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for base in given.pop("defaults", []):
        merged |= preset(base)
    partition = merged.get("partition", {}) | given.pop("partition", {})
    merged |= given | ({"partition": partition} if partition else {})
    meant = {"${model_has_tokens:}": True, "${model.hidden_size}": HIDDEN_SIZE, "${seed}": 0}

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(inner) for key, inner in value.items()}
        return meant.get(value, value) if isinstance(value, str) else value

    found: dict[str, Any] = resolved(merged)
    return found


NAMES = [*sorted(path.stem for path in PRESETS.glob("*.yaml")), "three_symbols"]
every_head = pytest.mark.parametrize("name", NAMES)


def built(name: str) -> Model:
    """A model on the GPU whose numbers bfloat16 holds exactly. Skips where a head cannot be had."""
    torch.manual_seed(0)
    settings = settings_of(name)
    embedding = nn.Embedding(VOCABULARY_SIZE, HIDDEN_SIZE)
    order: Tensor | None = torch.randperm(VOCABULARY_SIZE)
    if settings.type == "mixture":
        order = torch.stack([torch.randperm(VOCABULARY_SIZE) for _ in settings.mixture])
    try:
        head = build_head(settings, VOCABULARY_SIZE, embedding, order)
    except UserError as error:
        pytest.skip(str(error))
    model = Model(embedding, head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(nn.init.normal_(parameter, std=WEIGHT_STD).bfloat16())
    return model.to(DEVICE)


def exact_twin(model: Model) -> Model:
    """The same in float64 on the CPU, where a fused head, which runs nowhere but on CUDA, is the full softmax it is."""
    twin = copy.deepcopy(model).cpu().double()
    if isinstance(twin.head, FusedHead):
        twin.head.__class__ = FullHead
    return twin


def batch(seed: int = 1, times: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states and targets, most of them of few tokens and some ignored, on the CPU; the same rows ``times``."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=generator).bfloat16().float()
    targets = (torch.rand(NUM_ROWS, generator=generator) ** 4 * VOCABULARY_SIZE).long()
    targets[::7] = IGNORE_INDEX
    return hidden.repeat(times, 1), targets.repeat(times)


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32)


def trained(model: Model, hidden: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    with autocast(dtype):
        result = model.head.loss(hidden, targets, with_accuracy=True)
    inputs = [hidden, *model.parameters()]
    return result, list(torch.autograd.grad(result.loss, inputs, allow_unused=True, materialize_grads=True))


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(float(gradient.norm()) for gradient in expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.isfinite().all(), index
        error = float((one.double().cpu() - other).norm())
        assert error <= tolerance * max(float(other.norm()), CANCELLED * largest), (index, error, float(other.norm()))


@every_head
@every_dtype
def test_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    model = built(name)
    exact = exact_twin(model)
    for hidden, targets in (batch(), (batch()[0][:3], torch.full((3,), IGNORE_INDEX))):
        given = hidden.to(DEVICE).requires_grad_()
        there = hidden.double().requires_grad_()
        expected, expected_gradients = trained(exact, there, targets, torch.float32)
        try:
            found, gradients = trained(model, given, targets.to(DEVICE), dtype)
        except UserError as error:
            pytest.skip(str(error))
        torch.testing.assert_close(
            found.loss.double().cpu(), expected.loss, rtol=LOSS_TOLERANCES[dtype], atol=LOSS_TOLERANCES[dtype]
        )
        assert found.parts.keys() == expected.parts.keys()
        for part, value in expected.parts.items():
            # The likeliest of two that are as good as equal may be the other one, in one row or two.
            atol = 0.02 if "accuracy" in part else 2 * LOSS_TOLERANCES[dtype]
            torch.testing.assert_close(found.parts[part].double().cpu(), value.double(), rtol=atol, atol=atol)
        assert_near(gradients, expected_gradients, TOLERANCES[dtype])


@every_head
def test_each_rows_log_prob(name: str) -> None:
    model = built(name)
    exact = exact_twin(model)
    hidden, targets = batch()
    try:
        found = model.head.target_log_prob(hidden.to(DEVICE).requires_grad_(), targets.to(DEVICE))
    except UserError as error:
        pytest.skip(str(error))
    expected = exact.head.target_log_prob(hidden.double(), targets)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, NUM_ROWS)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((weights.to(DEVICE) * found).sum(), parameters, materialize_grads=True)
    loss = (weights.double() * exact.head.target_log_prob(hidden.double(), targets)).sum()
    assert_near(
        list(gradients), list(torch.autograd.grad(loss, list(exact.parameters()), materialize_grads=True)), 2e-5
    )


@every_head
def test_the_likeliest_tokens(name: str) -> None:
    model = built(name)
    exact = exact_twin(model)
    hidden = 3 * batch()[0][:50]
    values, tokens = model.head.topk(hidden.to(DEVICE), 20)
    every = exact.head.log_prob(hidden.double())
    assert every.exp().sum(dim=-1).sub(1).abs().max() < 1e-9
    torch.testing.assert_close(values.double().cpu(), every.topk(20).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.double().cpu(), every.gather(-1, tokens.cpu()), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == 20 for row in tokens.tolist())
    found = model.head.log_prob(hidden.to(DEVICE))
    torch.testing.assert_close(found.double().cpu(), every, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "folded", "scale_shift_bpe", "shortlist_frequency", "mixture_clustered"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 30}, {"top_p": 0.6}], ids=str)
def test_draws_follow_the_distribution(name: str, settings: dict[str, Any]) -> None:
    model = built(name)
    hidden = 4 * batch()[0][:1]
    num_draws, num_bins = 20_000, 25
    drawn = model.head.sample(
        hidden.to(DEVICE).expand(num_draws, -1).contiguous(),
        generator=torch.Generator(DEVICE).manual_seed(3),
        **settings,
    )
    chances = model.head.log_prob(hidden.to(DEVICE))[0].double().cpu()
    chances = (chances / settings.get("temperature", 1.0)).softmax(dim=-1)
    ranked, tokens = chances.sort(descending=True)
    if "top_k" in settings:
        ranked[settings["top_k"] :] = 0
    if "top_p" in settings:
        ranked[ranked.cumsum(0) - ranked >= settings["top_p"]] = 0
    ranked /= ranked.sum()
    # Tokens by falling chance in bins of about the same mass, so that each expects many draws.
    bins = (ranked.cumsum(0).sub(ranked / 2) * num_bins).long().clamp(max=num_bins - 1)
    rank = torch.empty_like(tokens)
    rank[tokens] = torch.arange(len(tokens))
    ranks = rank[drawn.cpu()]
    assert (ranked[ranks] > 0).all()
    expected = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, ranked) * num_draws
    counts = torch.bincount(bins[ranks], minlength=num_bins)
    kept = expected > 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert kept.sum() == 1 or chi2.sf(statistic, int(kept.sum()) - 1) > 1e-5


def capturable(name: str) -> Model:
    model = built(name)
    if not model.head.capturable:
        pytest.skip("a head that is not said to be capturable")
    return model


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_head
@every_dtype
def test_the_host_never_waits(name: str, dtype: torch.dtype) -> None:
    model = capturable(name)
    hidden, targets = (tensor.to(DEVICE) for tensor in batch(times=MANY))
    hidden.requires_grad_()
    trained(model, hidden, targets, dtype)  # kernels are compiled, and libraries find their workspaces
    with no_waiting():
        trained(model, hidden, targets, dtype)


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``step``, which is run three times before, and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    model = capturable(name)
    hidden, targets = (tensor.to(DEVICE) for tensor in batch(times=MANY))
    hidden.requires_grad_()
    graph, (result, gradients) = captured(lambda: trained(model, hidden, targets, dtype))
    for seed in (2, 3):
        other_hidden, other_targets = (tensor.to(DEVICE) for tensor in batch(seed, MANY))
        with torch.no_grad():
            hidden.copy_(other_hidden)
            targets.copy_(other_targets)
        graph.replay()
        expected, expected_gradients = trained(model, other_hidden.requires_grad_(), other_targets, dtype)
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.parts, expected.parts, rtol=1e-5, atol=1e-6)
        # Where sums are made with atomics, their order is not the same twice.
        assert_near(gradients, [gradient.double().cpu() for gradient in expected_gradients], TOLERANCES[dtype] / 2)


@pytest.mark.parametrize("name", ["full", "folded", "linear_tied", "scale_shift_bpe", "low_rank_clustered"])
def test_a_graph_of_whole_steps(name: str) -> None:
    """Forward, backward, clipping and AdamW, with an embedding below the head, against the same steps one by one."""
    model = capturable(name)
    twin = copy.deepcopy(model)
    batches = [tuple(tensor.to(DEVICE) for tensor in batch(seed)) for seed in range(6)]
    static = [tensor.clone() for tensor in batches[0]]

    def stepping(model: Model) -> Callable[[Tensor, Tensor], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)

        def step(hidden: Tensor, targets: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with autocast(torch.bfloat16):
                below = hidden + model.embedding(targets.clamp(min=0)).tanh()
                loss: Tensor = model.head.loss(below, targets).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        return step

    one, other = stepping(model), stepping(twin)
    graph, loss = captured(lambda: one(*static))
    for _ in range(3):
        other(*batches[0])
    for given in batches:
        for tensor, new in zip(static, given, strict=True):
            tensor.copy_(new)
        graph.replay()
        torch.testing.assert_close(loss, other(*given), rtol=5e-3, atol=5e-3)


def test_kernels_of_triton_run_where_it_is_installed() -> None:
    pytest.importorskip("triton")
    from vocabfold.heads import triton_kernels

    model = built("folded")
    calls: list[str] = []
    original = triton_kernels.SortedProducts.logits

    def spy(self: Any, *arguments: Any) -> Tensor:
        calls.append("logits")
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels.SortedProducts, "logits", spy)
        for dtype in TOLERANCES:
            hidden, targets = (tensor.to(DEVICE) for tensor in batch())
            trained(model, hidden.requires_grad_(), targets, dtype)
    assert len(calls) == len(TOLERANCES)
