"""From settings to the order of a vocabulary and the sizes of its groups."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.heads.exchange import exchanged_order
from vocabfold.heads.orders import (
    banded_order,
    clustered_order,
    cooccurrence_embedding,
    frequency_order,
    random_order,
)
from vocabfold.heads.partition import (
    Partition,
    bands_of,
    equal_boundaries,
    partition_over,
    rising_boundaries,
)
from vocabfold.heads.settings import GROUP_SIZES, ORDERS, SYMBOLS, HeadSettings, PartitionSettings
from vocabfold.tokens import TokenStream, token_counts


def wanted_order(settings: HeadSettings) -> str | None:
    """One of ORDERS: that of the vocabulary which the head of these settings is built on, None where it has none.

    Raises UserError for an order that no partition has.
    """
    if settings.type == "adaptive":
        return "frequency"
    if settings.type == "mixture" and settings.partition.clustered_from is not None:
        raise UserError("the parts of a mixture are clustered by neighbours: leave head.partition.clustered_from out")
    if settings.type != "folded":
        return None
    _check_order(settings.partition.order)
    return settings.partition.order


def vocabulary_order(
    settings: HeadSettings, vocabulary_size: int, tokens: TokenStream, embedding: Tensor | None = None
) -> Tensor | None:
    """The order [V] that ``settings`` ask for ([K, V] of a mixture of K parts), counted on the training stream
    ``tokens`` where it depends on it; None for a head without a partition. ``embedding`` [V, D'] is clustered in place
    of the tokens' neighbours in the stream. Raises UserError for an order or sizes that no partition has."""
    if settings.type == "mixture":
        wanted_order(settings)
        parts = [part_settings(settings, index) for index in range(len(settings.mixture))]
        orders = [vocabulary_order(part, vocabulary_size, tokens, embedding) for part in parts]
        return torch.stack([order for order in orders if order is not None]) if orders else None
    partition, order = settings.partition, wanted_order(settings)
    if order is None:
        return None
    if order == "bpe":
        return torch.arange(vocabulary_size)
    if order == "random":
        return random_order(vocabulary_size, partition.seed)
    counts = token_counts(tokens, vocabulary_size)
    if order == "frequency":
        return frequency_order(counts)
    boundaries = wanted_boundaries(partition, vocabulary_size)
    if embedding is None:
        which = order.removeprefix("clustered").removeprefix("_") if order.startswith("clustered") else ""
        embedding = cooccurrence_embedding(tokens, vocabulary_size, counts, which or "both")
    ranked, shortlist, bands = frequency_order(counts), partition.shortlist, None
    if partition.group_sizes == "rising":
        bands = bands_of(boundaries, shortlist)
        clustered = banded_order(embedding, boundaries, bands, ranked, counts > 0)
    else:
        clustered = clustered_order(embedding, boundaries, ranked[:shortlist], counts > 0)
    return exchanged_order(tokens, clustered, boundaries, shortlist, bands) if order == "exchanged" else clustered


def wanted_boundaries(partition: PartitionSettings, vocabulary_size: int) -> Tensor:
    """The group boundaries [G + 1] that a partition's settings ask for. Raises UserError for sizes that none has."""
    if partition.group_sizes not in GROUP_SIZES:
        raise UserError(
            f"head.partition.group_sizes is {partition.group_sizes!r}: choose one of {', '.join(GROUP_SIZES)}"
        )
    sized = rising_boundaries if partition.group_sizes == "rising" else equal_boundaries
    return sized(vocabulary_size, wanted_group_size(partition, vocabulary_size), partition.shortlist)


def wanted_partition(partition: PartitionSettings, vocabulary_size: int, order: Tensor | None) -> Partition:
    """The partition of these settings over ``order`` [V] (None: token order). Raises UserError where none fits."""
    _check_order(partition.order)
    return partition_over(wanted_boundaries(partition, vocabulary_size), order)


def wanted_group_size(partition: PartitionSettings, vocabulary_size: int) -> int | None:
    """As set or, for three symbols a token, the cube root of the number of tokens in groups; None for the default of
    two. Raises UserError for another number of symbols."""
    if partition.symbols not in SYMBOLS:
        raise UserError(f"head.partition.symbols is {partition.symbols}: choose 2 or 3")
    if partition.group_size is not None or partition.symbols == 2:
        return partition.group_size
    return max(1, round((vocabulary_size - partition.shortlist) ** (1 / 3)))


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise UserError(f"head.partition.order is {order!r}: choose one of {', '.join(ORDERS)}")


def part_settings(settings: HeadSettings, index: int) -> HeadSettings:
    """Those of one part of a mixture, a folded head. A random order has a seed of its own in each part."""
    order = settings.mixture[index]
    partition = replace(settings.partition, order=order, seed=settings.partition.seed + index)
    return replace(settings, type="folded", partition=partition, mixture=[])
