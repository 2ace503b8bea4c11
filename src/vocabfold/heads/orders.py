"""Orders of the vocabulary: which token stands at which position of a partition."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.tokens import BLOCK_TOKENS, TokenStream

MOST_CONTEXTS = 256
MOST_COUNTS = 1 << 25  # numbers in a co-occurrence matrix, 128 MiB
CLUSTER_DIMENSIONS = 64
TWO_MEANS_ROUNDS = 8
SLOT_ROUNDS = 3
# The exact matching of a group's tokens with slots takes time S^3: a second for so many.
MOST_SLOTS_TO_MATCH = 1500


def frequency_order(counts: Tensor) -> Tensor:
    """From the most frequent token down: [V]; of equally frequent ones the smaller id first."""
    return counts.argsort(descending=True, stable=True)


def random_order(vocabulary_size: int, seed: int) -> Tensor:
    """A permutation [V] that ``seed`` alone decides."""
    return torch.randperm(vocabulary_size, generator=torch.Generator().manual_seed(seed))


def cooccurrence_embedding(tokens: TokenStream, vocabulary_size: int, counts: Tensor, which: str = "both") -> Tensor:
    """What stands beside each token of a stream, as a vector: [V, at most 64] float32.

    Counted are the neighbours before and after (``which`` "before" or "after": only those), among the most frequent
    tokens (256 of them, fewer where V is beyond 65,536); the positive part of log(observed / expected by chance) is
    reduced to its leading principal directions.
    """
    contexts = frequency_order(counts)[: max(16, min(MOST_CONTEXTS, MOST_COUNTS // (2 * vocabulary_size)))]
    num_contexts = len(contexts)
    context_of = np.full(vocabulary_size, -1, dtype=np.int64)
    context_of[contexts.numpy()] = np.arange(num_contexts)
    observed = np.zeros((2, vocabulary_size * num_contexts), dtype=np.float32)
    for start in range(0, len(tokens) - 1, BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS + 1].astype(np.int64)
        for side, (token, neighbour) in enumerate(((block[1:], block[:-1]), (block[:-1], block[1:]))):
            context = context_of[neighbour]
            pairs = token[context >= 0] * num_contexts + context[context >= 0]
            observed[side] += np.bincount(pairs, minlength=observed.shape[1])
    sides = torch.from_numpy(observed).view(2, vocabulary_size, num_contexts)
    for side in sides:
        expected = side.sum(1, keepdim=True) * side.sum(0, keepdim=True) / side.sum().clamp(min=1)
        side.copy_((side / expected.clamp(min=1e-9)).clamp(min=1).log())
    sides = {"both": sides, "before": sides[:1], "after": sides[1:]}[which]
    rows = sides.transpose(0, 1).reshape(vocabulary_size, len(sides) * num_contexts)
    # The directions come from a small square matrix: a decomposition of all V rows would take minutes.
    products = rows.T @ rows
    try:
        _, directions = torch.linalg.eigh(products)
    except torch.linalg.LinAlgError:  # a text of a few distinct tokens: the same direction again and again
        directions = torch.linalg.eigh(products.double())[1].float()
    return rows @ directions[:, -CLUSTER_DIMENSIONS:]


def clustered_order(
    embedding: Tensor, boundaries: Tensor, shortlisted: Tensor | None = None, known: Tensor | None = None
) -> Tensor:
    """Tokens with similar rows of ``embedding`` [V, D'] share a group, and across groups a slot: [V].

    ``boundaries`` [G + 1] are those of the partition to be; ``shortlisted`` [K] tokens take the first K positions.
    Only the rows of ``known`` [V] tokens (None: all) say anything: the others, such as those that a text lacks, are
    dealt out evenly and take the last slots of every group; among themselves they would fill whole groups.
    Groups: the known tokens are halved along the direction between the means of both halves, and each half again, with
    sizes that fit the boundaries. Slots: what a group's mean leaves of its tokens is matched with the slots' means
    over all groups. Deterministic. Raises UserError where the embedding is not finite.
    """
    if not embedding.isfinite().all():
        raise UserError("the embedding to cluster holds values that are not finite: train that run again")
    if shortlisted is None:
        shortlisted = torch.empty(0, dtype=torch.int64)
    rows = embedding.detach().float().cpu()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9)
    is_free = torch.ones(len(rows), dtype=torch.bool)
    is_free[shortlisted] = False
    is_known = is_free if known is None else is_free & known
    known_tokens, others = is_known.nonzero().squeeze(-1), (is_free & ~is_known).nonzero().squeeze(-1)
    group_starts = boundaries[boundaries >= len(shortlisted)] - len(shortlisted)
    # Whole numbers of known tokens, as near to their share of each group as running sums allow.
    known_starts = group_starts * len(known_tokens) // max(1, len(known_tokens) + len(others))
    groups = _match_slots(rows, _halve(rows, known_tokens, known_starts), known_starts)
    rest = others.split((group_starts - known_starts).diff().tolist())
    return torch.cat([shortlisted, *(part for pair in zip(groups, rest, strict=True) for part in pair)])


def banded_order(
    embedding: Tensor, boundaries: Tensor, bands: Tensor, ranked: Tensor, known: Tensor | None = None
) -> Tensor:
    """``ranked`` [V] tokens, the most frequent first, as ``clustered_order`` puts them within each band of groups
    alone: [V]. ``bands`` [G - K], rising, names the band of each group of ``boundaries`` [G + 1] after the first K,
    groups of one token that stay. ``known``: see ``clustered_order``."""
    shortlist = len(boundaries) - 1 - len(bands)
    parts = [ranked[:shortlist]]
    for band in bands.unique().tolist():
        members = (bands == band).nonzero().squeeze(-1) + shortlist
        starts = boundaries[int(members[0]) : int(members[-1]) + 2]
        tokens = ranked[int(starts[0]) : int(starts[-1])]
        of_band = None if known is None else known[tokens]
        parts.append(tokens[clustered_order(embedding[tokens], starts - starts[0], known=of_band)])
    return torch.cat(parts)


def _halve(rows: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
    """``tokens`` in an order that puts similar ones between the same two ``starts``."""
    if len(starts) <= 2:
        return tokens
    middle = len(starts) // 2
    num_left = int(starts[middle] - starts[0])
    if 0 < num_left < len(tokens):
        tokens = tokens[_ranks_along_the_split(rows[tokens], num_left)]
    left, right = tokens[:num_left], tokens[num_left:]
    return torch.cat([_halve(rows, left, starts[: middle + 1]), _halve(rows, right, starts[middle:])])


def _ranks_along_the_split(members: Tensor, num_left: int) -> Tensor:
    """The order of ``members`` along the direction between the means of the first ``num_left`` and of the others."""
    members = members - members.mean(0)
    # The widest direction to begin with: the far ends of the spread, found in two steps.
    far = members[members.norm(dim=1).argmax()]
    direction = far - members[(members - far).norm(dim=1).argmax()]
    for _ in range(TWO_MEANS_ROUNDS):
        ranked = (members @ direction).argsort(stable=True)
        direction = members[ranked[num_left:]].mean(0) - members[ranked[:num_left]].mean(0)
    return (members @ direction).argsort(stable=True)


def _match_slots(rows: Tensor, order: Tensor, starts: Tensor) -> list[Tensor]:
    """The groups of ``order``, the tokens of each dealt to slots so that a slot's tokens resemble each other across
    groups."""
    groups = list(order.split(starts.diff().tolist()))
    num_slots = max((len(group) for group in groups), default=0)
    if len(groups) < 2 or not 0 < num_slots <= MOST_SLOTS_TO_MATCH:
        return groups
    from scipy.optimize import linear_sum_assignment  # half a second of import time that other orders need not pay

    residuals = [rows[group] - rows[group].mean(0) for group in groups]
    largest = max(range(len(groups)), key=lambda index: len(groups[index]))
    slot_means = residuals[largest].clone()
    for _ in range(SLOT_ROUNDS):
        sums, numbers = torch.zeros_like(slot_means), torch.zeros(num_slots, 1)
        for index, (group, residual) in enumerate(zip(groups, residuals, strict=True)):
            similarity = residual @ slot_means[: len(group)].T
            _, token_in_slot = linear_sum_assignment(similarity.T.numpy(), maximize=True)
            dealt = torch.from_numpy(token_in_slot)
            groups[index], residuals[index] = group[dealt], residual[dealt]
            sums[: len(group)] += residuals[index]
            numbers[: len(group)] += 1
        slot_means = sums / numbers
    return groups
