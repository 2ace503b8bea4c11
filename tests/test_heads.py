"""The head contract: every head, at awkward sizes, against the definition written out token by token in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from head_cases import (
    FOLDED_KINDS,
    FULL_KINDS,
    KINDS,
    LAYOUTS,
    Layout,
    make_head,
    make_hidden,
    naive_groups,
    naive_log_prob,
    one_case_a_kind,
)
from vocabfold.heads import FoldedHead, FullHead, LoopedLinearScorer, MixtureHead, loss_options, visiting
from vocabfold.tokens import IGNORE_INDEX

TARGETS = ("mixed", "one_group", "some_ignored", "all_ignored", "empty", "one_row")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_targets(pattern: str, layout: Layout) -> Tensor:
    num_rows = {"empty": 0, "one_row": 1}.get(pattern, 9)
    targets = torch.randint(layout.vocabulary_size, (num_rows,), generator=torch.Generator().manual_seed(3))
    if pattern == "one_group":
        tokens = torch.tensor(naive_groups(layout)[-1])
        return tokens[targets % len(tokens)]
    if pattern == "some_ignored":
        targets[::2] = IGNORE_INDEX
    if pattern == "all_ignored":
        targets[:] = IGNORE_INDEX
    return targets


def naive_loss(log_prob: Tensor, targets: Tensor) -> Tensor:
    counted = [(row, token) for row, token in enumerate(targets.tolist()) if token != IGNORE_INDEX]
    total = log_prob.sum() * 0
    for row, token in counted:
        total = total - log_prob[row, token]
    return total / max(1, len(counted))


def gradients(loss: Tensor, hidden: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *module.parameters()], allow_unused=True, materialize_grads=True))


@one_case_a_kind(LAYOUTS)
def test_log_prob_is_the_definition_and_sums_to_one(kind: str, layout: Layout) -> None:
    head, _ = make_head(kind, layout)
    hidden = make_hidden(5)
    log_prob = head.log_prob(hidden)
    assert log_prob.shape == (5, layout.vocabulary_size)
    torch.testing.assert_close(log_prob.exp().sum(dim=-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_prob, naive_log_prob(kind, layout, head, hidden), rtol=0, atol=1e-12)
    assert head.log_prob(hidden[:0]).shape == (0, layout.vocabulary_size)


@one_case_a_kind(LAYOUTS, kinds=[*FOLDED_KINDS, "adaptive"])
def test_slots_without_a_token_get_no_probability(kind: str, layout: Layout) -> None:
    head, _ = make_head(kind, layout)
    assert isinstance(head, FoldedHead)
    hidden = make_hidden(4)
    probability = head.scorer.group_log_prob(hidden, torch.arange(head.partition.num_groups).expand(4, -1)).exp()
    assert probability[:, ~head.partition.slot_exists].eq(0).all()
    torch.testing.assert_close(probability.sum(dim=-1), torch.ones_like(probability[..., 0]), rtol=0, atol=1e-12)


def test_the_layouts_leave_slots_empty() -> None:
    for layout in (LAYOUTS["prime"], LAYOUTS["group_size_not_dividing"]):
        head, _ = make_head("scale_shift", layout)
        assert isinstance(head, FoldedHead)
        assert not head.partition.slot_exists.all()


@one_case_a_kind(LAYOUTS, TARGETS)
def test_loss_and_gradients_are_those_of_the_definition(kind: str, layout: Layout, pattern: str) -> None:
    head, module = make_head(kind, layout)
    targets = make_targets(pattern, layout)
    hidden = make_hidden(len(targets)).requires_grad_()
    expected = naive_loss(naive_log_prob(kind, layout, head, hidden), targets)
    expected_gradients = gradients(expected, hidden, module)
    for with_accuracy in (False, True):
        result = head.loss(hidden, targets, with_accuracy)
        torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(result.loss, hidden, module), expected_gradients, rtol=1e-10, atol=1e-12)
        assert result.num_targets == (targets != IGNORE_INDEX).sum()
        assert not any(part.requires_grad for part in result.parts.values())
    assert torch.equal(head(hidden, targets).loss, head.loss(hidden, targets).loss)

    per_row = head.target_log_prob(hidden, targets)
    assert per_row.shape == targets.shape
    assert per_row[targets == IGNORE_INDEX].eq(0).all()
    torch.testing.assert_close(-per_row.sum() / result.num_targets.clamp(min=1), expected, rtol=1e-12, atol=1e-12)
    if result.num_targets == 0:
        assert result.loss == 0


@one_case_a_kind(TARGETS)
def test_float32_is_close_to_float64(kind: str, pattern: str) -> None:
    layout = LAYOUTS["prime"]
    head, module = make_head(kind, layout)
    single = copy.deepcopy(module).float()
    targets = make_targets(pattern, layout)
    hidden = make_hidden(len(targets)).requires_grad_()
    hidden_single = hidden.detach().float().requires_grad_()
    loss, loss_single = head.loss(hidden, targets).loss, single.head(hidden_single, targets).loss
    assert loss_single.dtype == torch.float32
    torch.testing.assert_close(loss_single.double(), loss, rtol=1e-5, atol=1e-6)
    found = [gradient.double() for gradient in gradients(loss_single, hidden_single, single)]
    torch.testing.assert_close(found, gradients(loss, hidden, module), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("chunked")])
def test_gradcheck(kind: str) -> None:
    """Along one direction of each input: test_loss_and_gradients_are_those_of_the_definition compares all numbers."""
    layout = Layout(7, 3, shuffled=True)
    head, _ = make_head(kind, layout)
    targets = torch.tensor([0, IGNORE_INDEX, 6, 3])
    inputs = (make_hidden(4).requires_grad_(), *head.parameters())
    assert torch.autograd.gradcheck(lambda hidden, *_: head.loss(hidden, targets).loss, inputs, fast_mode=True)


@every_kind
def test_ignored_rows_change_nothing(kind: str) -> None:
    layout = LAYOUTS["prime"]
    head, module = make_head(kind, layout)
    targets = make_targets("some_ignored", layout)
    ignored = targets == IGNORE_INDEX
    hidden = make_hidden(len(targets)).requires_grad_()
    alone = hidden[~ignored].detach().requires_grad_()
    result, result_alone = head.loss(hidden, targets, True), head.loss(alone, targets[~ignored], True)
    torch.testing.assert_close(result.loss, result_alone.loss)
    torch.testing.assert_close(result.parts, result_alone.parts)
    found, expected = gradients(result.loss, hidden, module), gradients(result_alone.loss, alone, module)
    assert found[0][ignored].eq(0).all()
    torch.testing.assert_close(found[0][~ignored], expected[0])
    torch.testing.assert_close(found[1:], expected[1:])
    elsewhere = hidden.detach() + 30 * ignored.unsqueeze(-1)
    assert torch.equal(head.loss(elsewhere, targets).loss, result.loss)


@one_case_a_kind(LAYOUTS)
def test_parts(kind: str, layout: Layout) -> None:
    head, _ = make_head(kind, layout)
    targets = make_targets("some_ignored", layout)
    hidden = make_hidden(len(targets))
    best = naive_log_prob(kind, layout, head, hidden).detach()
    counted = [(row, token) for row, token in enumerate(targets.tolist()) if token != IGNORE_INDEX]
    result = head.loss(hidden, targets, with_accuracy=True)
    if isinstance(head, FullHead):
        expected = {"accuracy": sum(int(best[row].argmax()) == token for row, token in counted)}
    elif isinstance(head, MixtureHead):
        expected = {}
        assert result.parts == {}
        hits = sum(int(best[row].argmax()) == token for row, token in counted)
        assert float(head.accuracy(hidden, targets)) == pytest.approx(hits / len(counted))
    else:
        parts = head.loss(hidden, targets).parts
        assert parts.keys() == {"group_loss", "token_loss"}
        torch.testing.assert_close(parts["group_loss"] + parts["token_loss"], result.loss)
        groups = naive_groups(layout, kind)
        expected = {"group_accuracy": 0, "token_accuracy": 0}
        for row, token in counted:
            masses = [float(best[row, group].exp().sum()) for group in groups]
            own = next(group for group in groups if token in group)
            expected["group_accuracy"] += groups[masses.index(max(masses))] == own
            expected["token_accuracy"] += max(own, key=lambda v: float(best[row, v])) == token
    for name, hits in expected.items():
        assert float(result.parts[name]) == pytest.approx(hits / len(counted))


@one_case_a_kind(LAYOUTS)
def test_a_head_that_is_prepared_to_decode_says_the_same(kind: str, layout: Layout) -> None:
    head, model = make_head(kind, layout)
    hidden = make_hidden(5)
    expected, best = head.log_prob(hidden), head.topk(hidden, 2)[1]
    drawn = head.sample(hidden, top_p=0.9, generator=torch.Generator().manual_seed(0))
    head.prepare_to_decode()
    torch.testing.assert_close(head.log_prob(hidden), expected)
    assert torch.equal(head.topk(hidden, 2)[1], best)
    assert torch.equal(head.sample(hidden, top_p=0.9, generator=torch.Generator().manual_seed(0)), drawn)
    if kind in FOLDED_KINDS and kind.endswith("tied") and layout.shuffled and layout.group_size != 1:
        assert isinstance(head, FoldedHead) and isinstance(head.scorer, LoopedLinearScorer)
        assert head.scorer.weight is not model.embedding.weight and not head.scorer.tied


@one_case_a_kind([-1, LAYOUTS["prime"].vocabulary_size])
def test_a_target_outside_the_vocabulary_is_refused(kind: str, target: int) -> None:
    head, _ = make_head(kind, LAYOUTS["prime"])
    for method in (head.loss, head.target_log_prob):
        with pytest.raises((IndexError, RuntimeError)):
            method(make_hidden(1), torch.tensor([target]))


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.num_elements = max(self.num_elements, leaf.numel())
        return result


SAMPLING: dict[str, dict[str, Any]] = {
    "sample": {},
    "sample_tempered": {"temperature": 0.8},
    "sample_top_p": {"top_p": 0.9},
    "sample_top_k": {"top_k": 20},
}


@one_case_a_kind(["loss", "accuracy", "target_log_prob", *SAMPLING])
def test_only_the_full_head_builds_n_times_v(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, num_rows = Layout(4099, None), 128
    monkeypatch.setattr(loss_options, "ROW_CHUNK_ELEMENTS", 8 * layout.vocabulary_size)
    head, module = make_head(kind, layout, weight_std=1.0)
    module.float()
    hidden = make_hidden(num_rows).float().requires_grad_()
    targets = torch.arange(num_rows) * 32
    with LargestTensor() as largest:
        if method in SAMPLING:
            head.sample(hidden, **SAMPLING[method])
        elif method == "target_log_prob":
            head.target_log_prob(hidden, targets).sum().backward()
        else:
            head.loss(hidden, targets, method == "accuracy").loss.backward()
    if kind.startswith("full") or (kind in FULL_KINDS and method in SAMPLING):
        assert largest.num_elements >= num_rows * layout.vocabulary_size
    elif kind == "adaptive":  # at most all rows times the tokens of its largest cluster
        assert isinstance(head, FoldedHead)
        assert largest.num_elements <= num_rows * head.partition.num_slots
    elif kind.startswith(("conditioned", "mixture")) and method in SAMPLING:  # such weights make most of its rows flat
        assert largest.num_elements <= visiting.WHOLE_ROWS_ELEMENTS
    else:
        assert largest.num_elements <= num_rows * layout.vocabulary_size // (2 if method in SAMPLING else 16)


@every_kind
def test_under_autocast(kind: str) -> None:
    layout = LAYOUTS["prime"]
    _, module = make_head(kind, layout)
    head = module.float().head
    targets = make_targets("some_ignored", layout)
    hidden = make_hidden(len(targets)).float()
    expected, expected_log_prob = head(hidden, targets).loss, head.log_prob(hidden)
    # A hidden state that was rounded on its way through more layers is off by more.
    loss_atol = 0.06 if kind.startswith("conditioned") or kind.endswith(("_wide", "_residual")) else 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (hidden, hidden.bfloat16()):
            results = [head(given, targets).loss, head(given, targets, True).loss]
            results.append(-head.target_log_prob(given, targets).sum() / (targets != IGNORE_INDEX).sum())
            for loss in results:
                assert loss.dtype == torch.float32
                torch.testing.assert_close(loss, expected, rtol=0, atol=loss_atol)
            log_prob = head.log_prob(given)
            atol = 0.4 if kind.startswith("conditioned") else 0.15
            torch.testing.assert_close(log_prob, expected_log_prob, rtol=0, atol=atol)
            sums = log_prob.exp().sum(dim=-1)
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


@every_kind
def test_loading_restores_the_partition(kind: str) -> None:
    layout = Layout(50, 7, shuffled=True)
    head, module = make_head(kind, layout)
    other, other_module = make_head(kind, layout, order=torch.arange(50), seed=1)
    hidden = make_hidden(5)
    assert not torch.equal(head.log_prob(hidden), other.log_prob(hidden))
    other_module.load_state_dict(module.state_dict())
    assert torch.equal(head.log_prob(hidden), other.log_prob(hidden))
    assert torch.equal(head.topk(hidden, 9)[1], other.topk(hidden, 9)[1])
    targets = torch.arange(5)
    assert torch.equal(head.target_log_prob(hidden, targets), other.target_log_prob(hidden, targets))


@every_kind
def test_safetensors_round_trip(kind: str, tmp_path: Path) -> None:
    layout = Layout(50, 7, shuffled=True)
    head, module = make_head(kind, layout)
    other, other_module = make_head(kind, layout, order=torch.arange(50), seed=1)
    save_model(module, str(tmp_path / "model.safetensors"))
    load_model(other_module, str(tmp_path / "model.safetensors"))
    assert torch.equal(head.log_prob(make_hidden(5)), other.log_prob(make_hidden(5)))
    assert torch.equal(module.embedding.weight, other_module.embedding.weight)
