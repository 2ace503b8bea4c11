"""What the peer heads have beyond the contract: torch's own functions as references, and kernels that need CUDA."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from head_cases import HIDDEN_SIZE, LAYOUTS, Layout, adaptive_cutoffs, make_head, make_hidden
from vocabfold import train as training
from vocabfold.errors import UserError
from vocabfold.heads import (
    AdaptiveHead,
    ChunkedHead,
    FullHead,
    FusedHead,
    HeadSettings,
    LossOptions,
    build_head,
)
from vocabfold.heads.describe import describe_head
from vocabfold.models.build import build_model
from vocabfold.runs.checkpoint import load_weights
from vocabfold.runs.compose import composed_settings
from vocabfold.runs.record import read_metrics
from vocabfold.runs.token_order import token_order
from vocabfold.tokens import IGNORE_INDEX

LAYOUT = LAYOUTS["prime"]
TARGETS = torch.tensor([3, IGNORE_INDEX, 96, 0, 50, 50, IGNORE_INDEX, 12])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_adaptive_head_is_torchs_adaptive_softmax(layout: Layout) -> None:
    head, _ = make_head("adaptive", layout)
    assert isinstance(head, AdaptiveHead)
    size, cutoffs = layout.vocabulary_size, adaptive_cutoffs(layout.vocabulary_size)
    reference = nn.AdaptiveLogSoftmaxWithLoss(HIDDEN_SIZE, size, cutoffs, div_value=2.0).double()
    reference.head.weight = head.group_weight
    scored = iter(head.scorer.tail)  # type: ignore[arg-type]
    ends = [*cutoffs[1:], size]
    for index, (start, end) in enumerate(zip(cutoffs, ends, strict=True)):
        if end - start > 1:
            reference.tail[index] = next(scored)
    hidden = make_hidden(9)
    positions = torch.arange(9) * 7 % size
    output = reference(hidden, positions)
    tokens = head.partition.order[positions]
    torch.testing.assert_close(head.target_log_prob(hidden, tokens), output.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(head.loss(hidden, tokens).loss, output.loss, rtol=0, atol=1e-12)
    by_token = reference.log_prob(hidden)[:, head.partition.position_of]
    torch.testing.assert_close(head.log_prob(hidden), by_token, rtol=0, atol=1e-12)


def test_an_adaptive_head_is_built_in_frequency_order() -> None:
    settings = HeadSettings("adaptive", "adaptive", tied=False, cutoffs=[5, 20, 400], div_value=2.0)
    stream = np.repeat(np.arange(30, dtype=np.uint16), np.arange(30))
    order = token_order(settings, 30, stream)
    assert order is not None
    assert order.tolist() == list(range(29, -1, -1))
    head = build_head(settings, 30, nn.Embedding(30, HIDDEN_SIZE), order)
    assert isinstance(head, AdaptiveHead)
    assert torch.equal(head.partition.order, order)
    assert head.partition.sizes.tolist() == [1, 1, 1, 1, 1, 15, 10]
    assert describe_head(settings, head) == {
        "head": "adaptive",
        "tied": False,
        "cutoffs": "5,20,400",
        "div_value": 2.0,
        "partition_order": "frequency",
        "group_size": 15,
        "num_groups": 7,
        "shortlist": 5,
    }


@pytest.mark.parametrize("targets", [torch.full((8,), IGNORE_INDEX), torch.arange(0)])
def test_an_adaptive_heads_clusters_without_a_row_have_zero_gradients(targets: Tensor) -> None:
    head, _ = make_head("adaptive", LAYOUT)
    hidden = make_hidden(len(targets))
    for loss in (head.loss(hidden, targets, True).loss, head.loss_with(hidden, targets, LossOptions(z_loss=0.1)).loss):
        head.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.eq(0).all() for parameter in head.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adaptive_head_trains_under_autocast(dtype: torch.dtype) -> None:
    head, module = make_head("adaptive", LAYOUT)
    hidden = make_hidden(8)
    expected = torch.autograd.grad(head.loss(hidden, TARGETS).loss, list(head.parameters()))
    head = module.float().head
    with torch.autocast("cpu", dtype=dtype):
        loss = head.loss(hidden.float(), TARGETS).loss
    assert loss.dtype == torch.float32
    for found, wanted in zip(torch.autograd.grad(loss, list(head.parameters())), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (HeadSettings(type="adaptive"), r"none to tie: use head\.tied=false"),
        (
            HeadSettings(type="adaptive", tied=False),
            r"none below the vocabulary size 30: choose smaller ones, or head=full",
        ),
        (
            HeadSettings(type="adaptive", tied=False, cutoffs=[9, 9]),
            r"head\.cutoffs is \[9, 9\]: choose one or more",
        ),
        (HeadSettings(type="adaptive", tied=False, cutoffs=[]), r"head\.cutoffs is \[\]: choose one or more rising"),
        (HeadSettings(type="adaptive", tied=False, cutoffs=[0, 9]), r"the first at least 1"),
        (HeadSettings(type="adaptive", tied=False, cutoffs=[5, 9]), r"head\.div_value 4\.0 leaves cluster 2 none of 6"),
        (HeadSettings(type="chunked", chunk_rows=0), r"head\.chunk_rows is 0: choose at least 1"),
        (HeadSettings(type="fused"), r"head=fused needs CUDA, .* head=chunked has the same loss"),
        (HeadSettings(type="fused", kernel="x"), r"head\.kernel is 'x': choose one of cce, liger"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    settings: HeadSettings, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        build_head(settings, 30, nn.Embedding(30, HIDDEN_SIZE))


def test_a_chunked_head_is_described_and_takes_its_rows() -> None:
    settings = HeadSettings("chunked", "chunked", chunk_rows=7)
    embedding = nn.Embedding(30, HIDDEN_SIZE)
    head = build_head(settings, 30, embedding)
    assert isinstance(head, ChunkedHead)
    assert head.weight is embedding.weight
    assert head.options.batch_chunk_size == 7
    assert describe_head(settings, head) == {"head": "chunked", "tied": True, "chunk_rows": 7}


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_the_chunk_changes_nothing(rows: int) -> None:
    full = FullHead(HIDDEN_SIZE, 97).double()
    chunked = ChunkedHead(HIDDEN_SIZE, 97, full.weight, chunk_rows=rows)
    hidden = make_hidden(8).requires_grad_()
    losses = [head.loss(hidden, TARGETS).loss for head in (full, chunked)]
    torch.testing.assert_close(losses[0], losses[1])
    expected, found = (torch.autograd.grad(loss, [hidden, full.weight]) for loss in losses)
    torch.testing.assert_close(found, expected)


def test_a_chunked_head_computes_gradients_where_they_are_wanted() -> None:
    head = ChunkedHead(HIDDEN_SIZE, 97).double()
    head.weight.requires_grad_(False)
    hidden = make_hidden(8).requires_grad_()
    head.loss(hidden, TARGETS).loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    with torch.no_grad():
        assert not head.loss(hidden, TARGETS).loss.requires_grad
    loss = head.loss(hidden, TARGETS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="called twice"):
        loss.backward()


@pytest.mark.parametrize(
    "overrides", [["head=chunked"], ["head=adaptive", "head.cutoffs=[20,60]", "head.div_value=2", "head.softcap=30"]]
)
def test_a_peer_trains_with_extras_and_its_weights_load_without_the_corpus(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path))
    tiny = ["data=zipf", "data.vocabulary_size=211", "data.num_train_tokens=4000", "data.num_valid_tokens=300"]
    tiny += ["sequence_length=16", "batch_size=4", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"]
    tiny += ["budget.tokens=null", "budget.steps=12", "log_every=1", "wandb.mode=disabled", f"run_dir={tmp_path}/run"]
    extras = ["head.label_smoothing=0.1", "head.z_loss=0.01"]
    settings = composed_settings([*tiny, *overrides, *extras])
    row = training.train(settings, "")
    first, *_, last = read_metrics(tmp_path / "run")
    parts = [last[f"train_{name}"] for name in ("negative_log_likelihood", "smoothing_loss", "z_loss")]
    assert last["train_loss"] == pytest.approx(0.9 * parts[0] + 0.1 * parts[1] + 0.01 * parts[2])
    assert parts[0] < first["train_negative_log_likelihood"]
    model = build_model(settings.model, settings.head, 211).eval()
    load_weights(tmp_path / "run", model)
    tokens = torch.from_numpy(training.load_data(settings.data).valid.tokens.astype("int64"))
    starts = range(0, len(tokens) - 1, 16)
    with torch.no_grad():
        losses = [
            model(window[None, :-1], window[None, 1:]).loss * (len(window) - 1)
            for window in (tokens[start : start + 17] for start in starts)
        ]
    assert row["validation_loss_nats"] == pytest.approx(float(sum(losses)) / (len(tokens) - 1), rel=1e-5)


def stand_in(calls: list[dict[str, Any]]) -> Any:
    """A function with the signature that both packages share, which computes what they promise and notes its call."""

    def function(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        calls.append({"dtype": hidden.dtype, **options})
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()
        if "bias" in options:
            logits = logits + calls[-1].pop("bias")
        if options["softcap"] is not None:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        return F.cross_entropy(logits, targets, ignore_index=options["ignore_index"], reduction=options["reduction"])

    return function


@pytest.fixture(params=["cce", "liger"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[dict[str, Any]]]:
    """A kernel's name, with a stand-in for its package, and the calls that the stand-in has had."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {
        "cce": ("cut_cross_entropy", "linear_cross_entropy"),
        "liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    }
    module_name, function_name = names[request.param]
    parents = module_name.split(".")
    for end in range(1, len(parents) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parents[:end]), ModuleType(".".join(parents[:end])))
    setattr(sys.modules[module_name], function_name, stand_in(calls))
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    return request.param, calls


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_a_fused_head_calls_its_kernel_as_its_package_asks(
    kernel: tuple[str, list[dict[str, Any]]], softcap: float | None
) -> None:
    name, calls = kernel
    settings = HeadSettings(type="fused", kernel=name, softcap=softcap)
    embedding = nn.Embedding(97, HIDDEN_SIZE)
    fused = build_head(settings, 97, embedding)
    assert isinstance(fused, FusedHead)
    row = describe_head(settings, fused)
    assert (row["kernel"], row.get("softcap")) == (name, softcap)
    full = FullHead(HIDDEN_SIZE, 97, fused.weight, softcap=softcap)
    hidden = make_hidden(8).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = fused.loss(hidden, TARGETS, True), full.loss(hidden, TARGETS, True)
        torch.testing.assert_close(
            fused.target_log_prob(hidden, TARGETS), full.target_log_prob(hidden, TARGETS), rtol=0, atol=0.05
        )
    torch.testing.assert_close(result.loss, expected.loss, rtol=0, atol=0.05)
    assert result.parts == expected.parts
    common = {"ignore_index": IGNORE_INDEX, "softcap": softcap}
    if name == "cce":
        common |= {"dtype": torch.bfloat16, "filter_eps": None}
    else:
        common |= {"dtype": torch.float32, "accum_dtype": torch.float32}
    assert calls == [common | {"reduction": "sum"}, common | {"reduction": "none"}]


def test_a_fused_head_has_biases_where_its_kernel_takes_them(kernel: tuple[str, list[dict[str, Any]]]) -> None:
    settings = HeadSettings(type="fused", kernel=kernel[0], tied=False, count_biases=True)
    counts = torch.arange(97)
    if kernel[0] == "cce":
        with pytest.raises(UserError, match=r"takes no biases .* use head\.kernel=liger or head\.count_biases=false"):
            build_head(settings, 97, nn.Embedding(97, HIDDEN_SIZE), counts=counts)
        return
    fused = build_head(settings, 97, nn.Embedding(97, HIDDEN_SIZE), counts=counts)
    assert isinstance(fused, FusedHead) and fused.bias is not None and fused.bias.std() > 0.5
    full = FullHead(HIDDEN_SIZE, 97, fused.weight, with_bias=True)
    full.bias = fused.bias
    hidden = make_hidden(8).float()
    torch.testing.assert_close(fused.loss(hidden, TARGETS).loss, full.loss(hidden, TARGETS).loss)


def test_a_fused_head_without_targets_calls_no_kernel(kernel: tuple[str, list[dict[str, Any]]]) -> None:
    name, calls = kernel
    fused = build_head(HeadSettings(type="fused", tied=False, kernel=name), 97, nn.Embedding(97, HIDDEN_SIZE))
    for targets in (torch.full((3,), IGNORE_INDEX), torch.empty(0, dtype=torch.int64)):
        hidden = make_hidden(len(targets)).float().requires_grad_()
        for loss in (fused.loss(hidden, targets, True).loss, fused.target_log_prob(hidden, targets).sum()):
            assert loss == 0
            assert all(part.eq(0).all() for part in torch.autograd.grad(loss, [hidden, *fused.parameters()]))
        assert fused.target_log_prob(hidden, targets).shape == targets.shape
    assert calls == []


def test_a_fused_head_names_what_it_cannot_do(kernel: tuple[str, list[dict[str, Any]]]) -> None:
    name, _ = kernel
    fused = build_head(HeadSettings(type="fused", kernel=name), 97, nn.Embedding(97, HIDDEN_SIZE))
    for target in (-1, 97):
        with pytest.raises(IndexError):
            fused.loss(make_hidden(1).float(), torch.tensor([target]))
    if name == "cce":
        with pytest.raises(UserError, match=r"computes in bfloat16 or float16: use precision=bf16, or head\.kernel="):
            fused.loss(make_hidden(8).float(), TARGETS)


@pytest.mark.parametrize(("name", "package"), [("cce", "cut-cross-entropy"), ("liger", "liger-kernel")])
def test_a_fused_head_names_the_package_it_needs(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=rf"triton.*install {package} with pip install -e '\.\[peers\]'.*head=chunked"):
        build_head(HeadSettings(type="fused", kernel=name), 30, nn.Embedding(30, HIDDEN_SIZE))
