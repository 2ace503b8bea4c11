"""A head as columns of a result row: which of its kind it is."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from vocabfold.heads.adaptive import AdaptiveHead
from vocabfold.heads.base import Head
from vocabfold.heads.chunked import ChunkedHead
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.fused import FusedHead
from vocabfold.heads.mixture import MixtureHead
from vocabfold.heads.settings import EXTRAS, HeadSettings


def describe_head(settings: HeadSettings, head: Head) -> dict[str, Any]:
    """The columns of a result row that say which head was trained (empty where a head has no such thing)."""
    extras = {name: value for name in EXTRAS if (value := getattr(settings, name))}
    return {"head": settings.name, "tied": settings.tied, **columns(head, settings), **extras}


@singledispatch
def columns(head: Head, settings: HeadSettings) -> dict[str, Any]:
    """Which head of its kind ``head`` is, made from ``settings``; none where there is one of a kind."""
    return {}


@columns.register
def _(head: FoldedHead, settings: HeadSettings) -> dict[str, Any]:
    order = settings.partition.order
    own: dict[str, Any] = {"head_rank": settings.rank} if settings.scorer.startswith("low_rank") else {}
    if order == "random":
        own["partition_seed"] = settings.partition.seed
    if order in ("clustered", "exchanged") and settings.partition.clustered_from:
        own["clustered_from"] = settings.partition.clustered_from
    if settings.partition.group_sizes != "equal":
        own["group_sizes"] = settings.partition.group_sizes
    if settings.partition.symbols != 2:
        own["symbols"] = settings.partition.symbols
    return {
        **own,
        "scorer": settings.scorer,
        "partition_order": order,
        "group_size": head.partition.num_slots,
        "num_groups": head.partition.num_groups,
        "shortlist": settings.partition.shortlist,
    }


@columns.register
def _(head: AdaptiveHead, settings: HeadSettings) -> dict[str, Any]:
    return {
        "cutoffs": ",".join(map(str, settings.cutoffs)),
        "div_value": settings.div_value,
        "partition_order": "frequency",
        "group_size": head.partition.num_slots,
        "num_groups": head.partition.num_groups,
        "shortlist": len(head.partition.single_groups),
    }


@columns.register
def _(head: MixtureHead, settings: HeadSettings) -> dict[str, Any]:
    return {**columns(head.heads[0], settings), "partition_order": "+".join(settings.mixture)}


@columns.register
def _(head: ChunkedHead, settings: HeadSettings) -> dict[str, Any]:
    return {"chunk_rows": settings.chunk_rows}


@columns.register
def _(head: FusedHead, settings: HeadSettings) -> dict[str, Any]:
    return {"kernel": settings.kernel}
