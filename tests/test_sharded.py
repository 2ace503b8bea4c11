"""Heads spread over gloo processes against the same heads in one piece, in float64 and at awkward sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from head_cases import HIDDEN_SIZE, LAYOUTS, Layout, make_head, make_hidden
from process_cases import on_ranks
from vocabfold.errors import UserError
from vocabfold.heads import FoldedHead, FullHead, Head, LossOptions, collectives
from vocabfold.heads.linear import LoopedLinearScorer
from vocabfold.heads.sharded import ShardedFullHead, shard_head
from vocabfold.heads.sharded_folded import ShardedFoldedHead, owners_of_groups
from vocabfold.heads.traffic import folded_traffic, full_traffic, gradient_bytes
from vocabfold.tokens import IGNORE_INDEX

KINDS = (
    "full_free",
    "full_bias_tied",
    "sorted_free",
    "sorted_tied",
    "looped_free",
    "sorted_free_bias",
    "conditioned_free_wide",
    "conditioned_tied",
    "conditioned_free_gated",
)
ROW_PARAMETERS = ("weight", "bias", "group_embedding", "group_gate")  # of a scorer, which lie spread
WORLDS = (2, 4)
# Rows of each process: an empty batch, one whose targets are all ignored, unequal numbers.
ROWS = (5, 0, 3, 4)
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def batches(layout: Layout, world_size: int, ignored: str) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and targets of each process; ``ignored``: some targets, those of the third process, or all."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for rank, number in enumerate(ROWS[:world_size]):
        targets = torch.randint(layout.vocabulary_size, (number,), generator=generator)
        if ignored == "all" or rank == 2:
            targets[:] = IGNORE_INDEX
        targets[1:2] = IGNORE_INDEX
        found.append((make_hidden(number, seed=rank), targets))
    return found


def loss_and_gradients(head: Head, hidden: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    output = head.loss(hidden, targets, with_accuracy=True)
    (output.loss * factor).backward()
    assert hidden.grad is not None
    return output.loss.detach(), hidden.grad


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, **EXACT, msg=lambda message: f"{what}: {message}")


def check_loss(rank: int, world_size: int, kind: str, layout: Layout, ignored: str, softcap: float | None) -> None:
    """Loss, parts and all gradients of one backward pass, each process's loss times a factor of its own."""
    whole, _ = make_head(kind, layout, softcap=softcap)
    sharded = shard_head(whole)
    everybody = batches(layout, world_size, ignored)
    losses = []
    for other, (hidden, targets) in enumerate(everybody):
        loss, grad = loss_and_gradients(whole, hidden, targets, other + 1.0)
        losses.append((loss, grad, whole.loss(hidden, targets, with_accuracy=True)))
    loss, grad = loss_and_gradients(sharded, *everybody[rank], rank + 1.0)
    close(loss, losses[rank][0], "loss")
    close(grad, losses[rank][1], "gradient of hidden")
    output, expected = sharded.loss(*everybody[rank], with_accuracy=True), losses[rank][2]
    assert output.parts.keys() == expected.parts.keys() and output.num_targets == expected.num_targets
    for name, value in expected.parts.items():
        close(output.parts[name].double(), value.double(), name)
    check_parameter_gradients(whole, sharded)


def check_parameter_gradients(whole: Head, sharded: Head) -> None:
    """Of rows that lie here those of the sum of all losses; of the groups, which all have, summed over all."""
    if isinstance(sharded, ShardedFullHead):
        assert isinstance(whole, FullHead) and sharded.weight.grad is not None and whole.weight.grad is not None
        close(sharded.weight.grad, whole.weight.grad[sharded.own], "gradient of rows")
        if sharded.bias is not None and whole.bias is not None:
            assert sharded.bias.grad is not None and whole.bias.grad is not None
            close(sharded.bias.grad, whole.bias.grad[sharded.own], "gradient of biases")
        return
    assert isinstance(whole, FoldedHead) and isinstance(sharded, ShardedFoldedHead)
    partition, scorer = whole.partition, whole.scorer
    assert isinstance(scorer, LoopedLinearScorer)
    held = dict(sharded.named_parameters())
    replicated = set(map(id, sharded.replicated_parameters()))
    for name, parameter in whole.named_parameters():
        inner = name.removeprefix("scorer.")
        own = held.get(name if inner == name else f"scorer.local.{inner}")
        if parameter.grad is None:  # there is no group of more than one token
            continue
        if inner == name or inner not in ROW_PARAMETERS:
            assert own is None or id(own) in replicated, name
            total = torch.zeros_like(parameter) if own is None or own.grad is None else own.grad.clone()
            dist.all_reduce(total)
            close(total, parameter.grad, name)
        elif own is not None:
            assert id(own) not in replicated, name
            by_token = inner in ("weight", "bias")
            groups = partition.group_of[partition.multi_tokens] if by_token else partition.multi_groups
            rows = (sharded.scorer.owners[groups] == dist.get_rank()).nonzero().squeeze(-1)
            rows = partition.multi_tokens[rows] if inner == "weight" and scorer.tied else rows
            assert own.grad is not None, name
            close(own.grad, parameter.grad[rows], name)


def check_methods(rank: int, world_size: int, kind: str, layout: Layout) -> None:
    """Everything else that the contract of heads has, and the head in one piece again."""
    whole, _ = make_head(kind, layout)
    sharded = shard_head(whole)
    hidden, targets = batches(layout, world_size, "some")[rank]
    close(sharded.log_prob(hidden), whole.log_prob(hidden), "log_prob")
    close(sharded.target_log_prob(hidden, targets), whole.target_log_prob(hidden, targets), "target_log_prob")
    close(sharded.entropy(hidden), whole.entropy(hidden) if len(hidden) else hidden.sum(-1), "entropy")
    for k in sorted({1, 2, layout.vocabulary_size}):
        (values, tokens), (expected, best) = sharded.topk(hidden, k), whole.topk(hidden, k)
        close(values, expected, "topk")
        assert torch.equal(tokens, best)
    options = LossOptions(label_smoothing=0.1, z_loss=0.01)
    weights = torch.linspace(-1, 2, len(hidden), dtype=hidden.dtype)
    expected = whole.loss_with(hidden, targets, options, weights).loss if len(hidden) else hidden.sum()
    close(sharded.loss_with(hidden, targets, options, weights).loss, expected, "loss_with")
    for sampling in ({"temperature": 0.0}, {"temperature": 0.7, "top_k": 2, "top_p": 0.9}, {"top_p": 0.8}):
        drawn, reference = (
            head.sample(hidden, **sampling, generator=torch.Generator().manual_seed(rank)) for head in (sharded, whole)
        )
        assert sharded.log_prob(hidden).gather(-1, drawn[:, None]).isfinite().all()
        if sampling != {"top_p": 0.8} or kind.startswith("full"):
            assert torch.equal(drawn, reference)
    again = sharded.unsharded()
    for name, value in whole.state_dict().items():
        if kind.startswith("full") or "tied" not in kind:
            assert torch.equal(again.state_dict()[name], value), name
    close(again.log_prob(hidden), whole.log_prob(hidden), "unsharded")


def check_many(rank: int, world_size: int, check: Callable[..., None], cases: list[tuple[Any, ...]]) -> None:
    for case in cases:
        try:
            check(rank, world_size, *case)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


def half_of_all(world_size: int, kinds: tuple[str, ...] = KINDS) -> list[tuple[str, Layout]]:
    """Every kind with every second layout; the others come with the other number of processes."""
    first = WORLDS.index(world_size)
    return [
        (kind, layout)
        for i, kind in enumerate(kinds)
        for j, layout in enumerate(LAYOUTS.values())
        if (i + j) % len(WORLDS) == first
    ]


def test_every_kind_gives_the_loss_and_gradients_of_the_head_in_one_piece_on_two_processes() -> None:
    cases: list[tuple[Any, ...]] = [
        (kind, layout, "some", None) for kind, layout in zip(KINDS, cycle(LAYOUTS.values()), strict=False)
    ]
    on_ranks(2, check_many, check_loss, [*cases, ("looped_free", LAYOUTS["shortlist"], "all", 1.5)])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
def test_losses_and_gradients_are_those_of_the_head_in_one_piece(world_size: int) -> None:
    cases: list[tuple[Any, ...]] = [(*pair, "some", None) for pair in half_of_all(world_size)]
    cases += [(kind, LAYOUTS["prime"], "all", None) for kind in KINDS]
    cases += [(kind, LAYOUTS["shortlist"], "some", 1.5) for kind in ("full_bias_tied", "looped_free")]
    on_ranks(world_size, check_many, check_loss, cases)


def test_the_whole_contract_of_the_best_kind_of_head_on_two_processes() -> None:
    on_ranks(2, check_many, check_methods, [("conditioned_free_wide", LAYOUTS["shortlist"])])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_rest_of_the_contract_is_that_of_the_head_in_one_piece(world_size: int) -> None:
    on_ranks(
        world_size,
        check_many,
        check_methods,
        half_of_all(world_size, ("full_bias_tied", "sorted_free_bias", "looped_free", "conditioned_free_wide")),
    )


def test_rows_are_spread_evenly_and_work_by_counts() -> None:
    head, _ = make_head("sorted_free", Layout(97, 9, shuffled=True, shortlist=5))
    assert isinstance(head, FoldedHead)
    counts = torch.zeros(97)
    frequent = head.partition.order[head.partition.boundaries[5:8]]  # a token of each of the first three large groups
    counts[frequent] = 100.0
    owners = owners_of_groups(head.partition, 4, counts)
    assert len(set(owners[5:8].tolist())) == 3
    numbers = torch.bincount(owners[head.partition.multi_groups], minlength=4)
    assert numbers.max() - numbers.min() <= 1


def refuse(rank: int, world_size: int) -> str:
    head, _ = make_head("scale_shift_sorted", LAYOUTS["prime"])
    with pytest.raises(UserError) as caught:
        shard_head(head)
    with pytest.raises(UserError):
        shard_head(make_head("adaptive", LAYOUTS["prime"])[0])
    with pytest.raises(UserError, match="use linear, residual or wide"):
        shard_head(make_head("conditioned_free_shared", LAYOUTS["prime"])[0])
    return str(caught.value)


def test_heads_without_rows_of_their_own_are_refused() -> None:
    assert "head.scorer=linear_sorted" in on_ranks(2, refuse)[0]


@contextmanager
def sent_bytes(rank: int, world_size: int) -> Iterator[dict[str, float]]:
    """Bytes that leave this process within it, from the tensors that the collectives really get."""
    total = {"bytes": 0.0}
    ring = (world_size - 1) / world_size

    def counted(real: Callable[..., Any], count: Callable[..., float]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            total["bytes"] += count(*arguments)
            return real(*arguments, **options)

        return call

    def of_parts(output: Tensor, rows: Tensor, received: Any = None, sent: list[int] | None = None) -> float:
        sent = sent or [len(rows) // world_size] * world_size
        return (sum(sent) - sent[rank]) * rows[:1].nbytes if len(rows) else 0.0

    with pytest.MonkeyPatch.context() as patch:
        for name, count in {
            "all_to_all_single": of_parts,
            "all_gather": lambda output, rows: ring * output.nbytes,
            "reduce_scatter": lambda output, rows: ring * rows.nbytes,
            "all_reduce": lambda rows, *_: 2 * ring * rows.nbytes,
        }.items():
            place = dist if name.startswith("all_to") or name == "all_reduce" else collectives
            patch.setattr(place, name, counted(getattr(place, name), count))
        yield total


def count_traffic(rank: int, world_size: int, kind: str, layout: Layout) -> tuple[list[float], list[float]]:
    """(bytes that forward, backward and the counts of rows send, the same from shapes)."""
    whole, _ = make_head(kind, layout)
    sharded = shard_head(whole)
    rows = 8
    hidden = make_hidden(rows, seed=rank).requires_grad_()
    targets = torch.randint(layout.vocabulary_size, (rows,), generator=torch.Generator().manual_seed(rank))
    with sent_bytes(rank, world_size) as forward:
        loss = sharded.loss(hidden, targets).loss
    with sent_bytes(rank, world_size) as backward:
        loss.backward()
    if isinstance(sharded, ShardedFoldedHead):
        groups = sharded.partition.group_of[targets]
        elsewhere = (sharded.scorer.owners[groups] != rank) & (sharded.partition.sizes[groups] > 1)
        expected = folded_traffic(HIDDEN_SIZE, world_size, 8, 8, float(elsewhere.double().mean()))
    else:
        expected = full_traffic(HIDDEN_SIZE, world_size, 8, 8)
    return (
        [forward["bytes"], backward["bytes"]],
        [rows * expected.forward_bytes + expected.bytes_per_step, rows * expected.backward_bytes],
    )


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["full_free", "sorted_free", "conditioned_free_wide"])
def test_traffic_from_shapes_is_what_the_collectives_get(kind: str, world_size: int) -> None:
    """Of all processes together: what comes back from a process depends on the rows that the others sent to it."""
    counted, expected = torch.tensor(on_ranks(world_size, count_traffic, kind, LAYOUTS["shortlist"])).sum(dim=0)
    assert counted.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert (counted > 0).all()


def test_a_folded_head_sends_a_row_to_one_process_and_a_full_one_to_all() -> None:
    full, folded = full_traffic(2048, 8, 2), folded_traffic(2048, 8, 2)
    assert full.bytes_per_token / folded.bytes_per_token == pytest.approx(8, rel=0.01)
    assert gradient_bytes(1000, 4) == 2 * 3 / 4 * 1000 * 4
