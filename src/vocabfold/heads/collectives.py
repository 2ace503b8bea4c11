"""Rows that travel between the processes of a group, with gradients that travel back: what sharded heads are made of.

Every function here is collective: all R processes of ``group`` (None: of the whole run) call it, in the same order, and
so runs its backward pass. A process takes part with no rows of its own, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vocabfold.heads.loss_options import ROW_CHUNK_ELEMENTS

Group = dist.ProcessGroup | None
# torch 2.13 gave these two new names
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def route(rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """``rows`` [sum of ``sent``, ...], sorted by the process that each goes to -> [sum of ``received``, ...], sorted by
    the process that each came from. The gradient goes the same way back."""
    result: Tensor = _Route.apply(rows, sent, received, group)
    return result


def gather(rows: Tensor, most: int, group: Group) -> Tensor:
    """``rows`` [N, ...], N <= ``most`` -> those of every process, each filled up with zeros: [R x most, ...]. The
    gradients that all processes have for a row are summed."""
    result: Tensor = _Gather.apply(rows, most, group)
    return result


def own_part(everybody: Tensor, number: int, group: Group) -> Tensor:
    """What is the same in every process, [R x most, ...] -> the first ``number`` rows of this process's part. The
    gradient of the others comes from their processes."""
    result: Tensor = _OwnPart.apply(everybody, number, group)
    return result


def numbers_everywhere(number: int, group: Group, device: torch.device) -> list[int]:
    """``number`` of every process [R]."""
    own = torch.tensor([number], device=device)
    numbers = own.new_empty(dist.get_world_size(group))
    all_gather(numbers, own, group=group)
    return list(map(int, numbers.tolist()))


def exchanged_numbers(sent: Tensor, group: Group) -> list[int]:
    """``sent`` [R], a number for each process -> the number from each process [R]."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return list(map(int, received.tolist()))


def on_every_rank(rows: Tensor, compute: Callable[[Tensor], tuple[Tensor, ...]], group: Group) -> tuple[Tensor, ...]:
    """``rows`` [N, D] of this process -> what ``compute`` ([M, D] -> each [M, C]) makes of them in each process: each
    [R, N, C]."""
    ranks = dist.get_world_size(group)
    most = max(1, *numbers_everywhere(len(rows), group, rows.device))
    equal = [most] * ranks
    results = compute(_tracked(gather(rows, most, group)))
    return tuple(route(result, equal, equal, group).unflatten(0, (ranks, most))[:, : len(rows)] for result in results)


def topk_of_all(
    hidden: Tensor, k: int, own_scores: Callable[[Tensor], Tensor], own_tokens: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """The ``k`` likeliest of the tokens of all processes, best first: (score [N, k], token [N, k]). ``own_scores``
    ([M, D] -> [M, tokens]): those of this process's tokens, in the order of ``own_tokens``."""

    def compute(rows: Tensor) -> tuple[Tensor, Tensor]:
        step = max(1, ROW_CHUNK_ELEMENTS // max(1, len(own_tokens)))
        best = [own_scores(part).topk(min(k, len(own_tokens)), dim=-1) for part in rows.split(step)]
        missing = (0, k - best[0].values.shape[1])
        scores = F.pad(torch.cat([part.values for part in best]), missing, value=-torch.inf)
        return scores, F.pad(own_tokens[torch.cat([part.indices for part in best])], missing)

    scores, tokens = (found.transpose(0, 1).flatten(1) for found in on_every_rank(hidden, compute, group))
    best = scores.topk(k, dim=-1)
    return best.values, tokens.gather(-1, best.indices)


def _tracked(rows: Tensor) -> Tensor:
    """``rows``, from which a backward pass starts in every process if it does in any: where one has nothing that
    learns, the others would wait for it."""
    return rows.requires_grad_() if torch.is_grad_enabled() and not rows.requires_grad else rows


def _connected(result: Tensor, rows: Tensor) -> Tensor:
    """``result``, through which the backward pass reaches ``rows`` in a process that made nothing of them, too."""
    if not rows.requires_grad or result.requires_grad or not result.is_floating_point():
        return result
    return result + 0.0 * rows[:0].sum()


def routed(
    rows: Tensor,
    places: Tensor,
    owners: Tensor,
    compute: Callable[[Tensor, Tensor], Tensor],
    group: Group,
) -> Tensor:
    """``rows`` [N, D], ``places`` [N], and the process that owns each, ``owners`` [N] -> [N, C] or [N]: what
    ``compute`` makes of the rows and places in that process."""
    owners, order = owners.sort(stable=True)
    numbers = torch.bincount(owners, minlength=dist.get_world_size(group))
    received = exchanged_numbers(numbers, group)
    sent = list(map(int, numbers.tolist()))
    there = _tracked(route(rows[order], sent, received, group))
    places_there = route(places[order].to(torch.int32), sent, received, group)
    results = route(_connected(compute(there, places_there.long()), there), received, sent, group)
    return torch.zeros_like(results).index_copy(0, order, results)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, most: int, group: Group) -> Tensor:
        ctx.number, ctx.group = len(rows), group
        return _all_gather(rows, most, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(ctx.group), *gradient.shape[1:])
        reduce_scatter(own, gradient.contiguous(), group=ctx.group)
        return own[: ctx.number], None, None


def _all_gather(rows: Tensor, most: int, group: Group) -> Tensor:
    own = rows.new_zeros(most, *rows.shape[1:])
    own[: len(rows)] = rows
    everybody = own.new_empty(dist.get_world_size(group) * most, *rows.shape[1:])
    all_gather(everybody, own, group=group)
    return everybody


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, everybody: Tensor, number: int, group: Group) -> Tensor:
        ctx.most, ctx.group = len(everybody) // dist.get_world_size(group), group
        first = dist.get_rank(group) * ctx.most
        return everybody[first : first + number].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(gradient, ctx.most, ctx.group), None, None
