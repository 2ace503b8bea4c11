"""Label smoothing, z-loss, weights, reductions, entropy and softcap of every head, against float64 written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from head_cases import (
    HIDDEN_SIZE,
    KINDS,
    LAYOUTS,
    Layout,
    make_head,
    make_hidden,
    naive_log_prob,
    naive_logits,
    naive_parts,
    one_case_a_kind,
)
from vocabfold.errors import UserError
from vocabfold.heads import Head, HeadSettings, LossOptions, build_head, loss_options
from vocabfold.heads.describe import describe_head
from vocabfold.tokens import IGNORE_INDEX

CAPPED_KINDS = ("full_tied", "full_free", "scale_shift", "low_rank", "looped_free", "looped_tied", "adaptive")
OPTIONS = {
    "plain": LossOptions(),
    "smoothed": LossOptions(label_smoothing=0.1),
    "z_loss": LossOptions(z_loss=0.3),
    "both_summed": LossOptions(label_smoothing=0.25, z_loss=0.1, reduction="sum"),
    "both_each": LossOptions(label_smoothing=1.0, z_loss=0.1, reduction="none"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_options, "ROW_CHUNK_ELEMENTS", 150)


def make_targets(layout: Layout, ignored: str = "some") -> Tensor:
    num_rows = 0 if ignored == "empty" else 8
    targets = torch.randint(layout.vocabulary_size, (num_rows,), generator=torch.Generator().manual_seed(3))
    targets[: num_rows if ignored == "all" else 2] = IGNORE_INDEX
    return targets


def naive_losses(
    kind: str, layout: Layout, head: Head, hidden: Tensor, targets: Tensor, options: LossOptions
) -> list[Tensor]:
    """The loss of each row, as LossOptions writes it."""
    parts = [naive_logits(*part, hidden) for part in naive_parts(kind, layout, head)]
    log_prob = naive_log_prob(kind, layout, head, hidden)
    losses = []
    for row, target in enumerate(targets.tolist()):
        if target == IGNORE_INDEX:
            losses.append(hidden.sum() * 0)
            continue
        mean = log_prob[row].mean()
        penalty = hidden.sum() * 0
        for group_logits, members in parts:
            penalty = penalty + group_logits[row].exp().sum().log() ** 2
            logits = next(logits for tokens, logits in members if target in tokens)
            if logits.shape[1] > 0:
                penalty = penalty + logits[row].exp().sum().log() ** 2
        likelihood = (1 - options.label_smoothing) * log_prob[row, target] + options.label_smoothing * mean
        losses.append(options.z_loss * penalty - likelihood)
    return losses


def reduced(losses: list[Tensor], targets: Tensor, options: LossOptions, hidden: Tensor) -> Tensor:
    stacked = torch.stack(losses) if losses else hidden.sum(dim=1)
    if options.reduction == "none":
        return stacked
    divisor = max(1, int((targets != IGNORE_INDEX).sum())) if options.reduction == "mean" else 1
    return stacked.sum() / divisor


def gradients(loss: Tensor, hidden: Tensor, module: nn.Module) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss) if loss.dim() else None
    inputs = [hidden, *module.parameters()]
    return list(torch.autograd.grad(loss, inputs, upstream, allow_unused=True, materialize_grads=True))


def check(
    kind: str,
    layout: Layout,
    targets: Tensor,
    options: LossOptions,
    weights: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    head, module = make_head(kind, layout, softcap=softcap)
    hidden = make_hidden(len(targets)).requires_grad_()
    expected = naive_losses(kind, layout, head, hidden, targets, options)
    if weights is not None:
        expected = [weight * loss for weight, loss in zip(weights, expected, strict=True)]
    result = head.loss_with(hidden, targets, options, weights)
    wanted = reduced(expected, targets, options, hidden)
    torch.testing.assert_close(result.loss, wanted, rtol=1e-11, atol=1e-11)
    found = gradients(result.loss, hidden, module)
    torch.testing.assert_close(found, gradients(wanted, hidden, module), rtol=1e-9, atol=1e-11)
    assert result.num_targets == (targets != IGNORE_INDEX).sum()


@one_case_a_kind(LAYOUTS, [*OPTIONS, "weighted"])
def test_values_and_gradients_are_those_of_the_definition(kind: str, layout: Layout, name: str) -> None:
    if name == "weighted":
        weights = torch.linspace(-1, 3, 8, dtype=torch.float64)
        check(kind, layout, make_targets(layout), OPTIONS["both_each"], weights)
    else:
        check(kind, layout, make_targets(layout), OPTIONS[name])


@one_case_a_kind(["all", "empty"])
def test_without_a_target_that_counts_the_loss_is_zero(kind: str, ignored: str) -> None:
    layout = LAYOUTS["all_but_one_group_single"]
    for options in OPTIONS.values():
        check(kind, layout, make_targets(layout, ignored), options)


@one_case_a_kind(LAYOUTS, kinds=CAPPED_KINDS)
def test_softcap(kind: str, layout: Layout) -> None:
    cap = 0.9  # low enough to bend most logits
    check(kind, layout, make_targets(layout), OPTIONS["both_summed"], softcap=cap)
    head, module = make_head(kind, layout, softcap=cap)
    hidden, targets = make_hidden(8).requires_grad_(), make_targets(layout)
    expected = naive_log_prob(kind, layout, head, hidden)
    torch.testing.assert_close(head.log_prob(hidden), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected.exp().sum(dim=-1), torch.ones_like(expected[:, 0]), rtol=0, atol=1e-12)
    k = min(5, layout.vocabulary_size)
    torch.testing.assert_close(head.topk(hidden, k)[0], expected.topk(k).values, rtol=0, atol=1e-12)
    wanted = reduced(naive_losses(kind, layout, head, hidden, targets, LossOptions()), targets, LossOptions(), hidden)
    result = head.loss(hidden, targets, with_accuracy=True)
    torch.testing.assert_close(result.loss, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(result.loss, hidden, module), gradients(wanted, hidden, module))
    without, _ = make_head(kind, layout)
    assert not torch.allclose(without.log_prob(hidden), expected, atol=1e-3)


@one_case_a_kind({name: LAYOUTS[name] for name in ("prime", "shortlist", "two_tokens")})
def test_entropy(kind: str, layout: Layout) -> None:
    head, module = make_head(kind, layout)
    hidden = make_hidden(7).requires_grad_()
    log_prob = naive_log_prob(kind, layout, head, hidden)
    expected = -(log_prob.exp() * log_prob).sum(dim=-1)
    entropy = head.entropy(hidden)
    torch.testing.assert_close(entropy, expected, rtol=1e-11, atol=1e-12)
    found, wanted = gradients(entropy, hidden, module), gradients(expected, hidden, module)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    assert head.entropy(hidden[:0]).shape == (0,)
    with torch.no_grad():
        assert torch.equal(head.entropy(hidden), entropy)


def test_entropy_of_a_uniform_distribution_is_log_v() -> None:
    for kind in KINDS:
        head, module = make_head(kind, LAYOUTS["one_slot"])
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        if kind == "adaptive":  # uniform over its groups
            continue
        torch.testing.assert_close(head.entropy(make_hidden(2)), torch.full((2,), math.log(11), dtype=torch.float64))


@every_kind
def test_parts(kind: str) -> None:
    layout = LAYOUTS["prime"]
    head, _ = make_head(kind, layout)
    hidden, targets = make_hidden(8), make_targets(layout)
    plain = head.loss(hidden, targets, with_accuracy=True)
    result = head.loss_with(hidden, targets, OPTIONS["both_summed"], with_accuracy=True)
    names = {"negative_log_likelihood", "smoothing_loss", "z_loss"}
    assert result.parts.keys() == plain.parts.keys() | names
    for name, value in plain.parts.items():  # the same numbers, in sums of another order
        torch.testing.assert_close(result.parts[name], value)
    torch.testing.assert_close(result.parts["negative_log_likelihood"], plain.loss)
    whole = 0.75 * plain.loss + 0.25 * result.parts["smoothing_loss"] + 0.1 * result.parts["z_loss"]
    torch.testing.assert_close(whole * result.num_targets, result.loss)
    assert head.loss_with(hidden, targets, LossOptions()).parts.keys() == {"negative_log_likelihood"}


@every_kind
def test_under_autocast_and_in_float32(kind: str) -> None:
    layout = LAYOUTS["prime"]
    head, module = make_head(kind, layout)
    hidden, targets, options = make_hidden(8), make_targets(layout), LossOptions(0.2, 0.05)
    expected, entropy = head.loss_with(hidden, targets, options).loss.float(), head.entropy(hidden).float()
    head = module.float().head
    hidden = hidden.float()
    torch.testing.assert_close(head.loss_with(hidden, targets, options).loss, expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (hidden, hidden.bfloat16()):
            loss = head.loss_with(given, targets, options).loss
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected, rtol=0, atol=0.05)
            torch.testing.assert_close(head.entropy(given), entropy, rtol=0, atol=0.05)
            gradient = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True, materialize_grads=True)
            assert all(part.isfinite().all() for part in gradient)


@every_kind
def test_the_options_of_training_are_left_out_of_evaluation(kind: str) -> None:
    layout = LAYOUTS["prime"]
    head, _ = make_head(kind, layout)
    head.training_options = LossOptions(label_smoothing=0.3, z_loss=0.2)
    hidden, targets = make_hidden(8), make_targets(layout)
    plain = head.loss(hidden, targets).loss
    assert torch.equal(head(hidden, targets).loss, head.loss_with(hidden, targets, head.training_options).loss)
    assert not torch.allclose(head(hidden, targets).loss, plain)
    head.eval()
    assert torch.equal(head(hidden, targets).loss, plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing", 1.5),
        ("label_smoothing", -0.1),
        ("z_loss", -1.0),
        ("z_loss", math.nan),
        ("reduction", "median"),
    ],
)
def test_options_that_no_loss_has_are_refused(name: str, value: float | str) -> None:
    with pytest.raises(UserError, match=rf"{name} is '?{value}"):
        LossOptions(**{name: value})  # type: ignore[arg-type]


def test_weights_of_another_shape_are_refused() -> None:
    head, _ = make_head("full_free", LAYOUTS["prime"])
    with pytest.raises(UserError, match=r"shape \(8, 1\) for targets of \(8,\)"):
        head.loss_with(make_hidden(8), torch.zeros(8, dtype=torch.int64), LossOptions(), torch.ones(8, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (HeadSettings(softcap=0.0), r"head\.softcap is 0\.0: choose more than 0"),
        (HeadSettings(type="folded", tied=False, softcap=-1.0), r"head\.softcap is -1\.0: choose more than 0"),
        (
            HeadSettings(type="folded", tied=False, scorer="scale_shift_sorted", softcap=30.0),
            r"plain scorers only",
        ),
        (HeadSettings(type="chunked", softcap=30.0), r"head=chunked cannot cap its logits, which torch computes: use"),
        (HeadSettings(label_smoothing=2.0), r"head\.label_smoothing is 2\.0"),
    ],
)
def test_settings_that_a_head_cannot_have_are_refused(settings: HeadSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_head(settings, 30, nn.Embedding(30, HIDDEN_SIZE))


def test_settings_reach_the_head_and_its_row() -> None:
    settings = HeadSettings(type="folded", tied=False, label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
    head = build_head(settings, 30, nn.Embedding(30, HIDDEN_SIZE))
    assert head.training_options == LossOptions(0.1, 1e-4)
    row = describe_head(settings, head)
    assert (row["scorer"], row["label_smoothing"], row["z_loss"], row["softcap"]) == ("scale_shift", 0.1, 1e-4, 30.0)
    settings = HeadSettings(z_loss=1e-4)
    row = describe_head(settings, build_head(settings, 30, nn.Embedding(30, HIDDEN_SIZE)))
    assert row == {"head": "full", "tied": True, "z_loss": 1e-4}
