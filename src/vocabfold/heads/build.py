"""From settings to a head. The rest of the project asks for a head here and never asks which one it got."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from vocabfold.errors import UserError
from vocabfold.heads.base import Head
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead
from vocabfold.heads.partition import Partition, equal_partition
from vocabfold.heads.scorers import LoopedLinearScorer, ScaleShiftScorer, TokenScorer

ORDERS = ("bpe",)
SCORERS = ("scale_shift", "linear_looped")


@dataclass
class PartitionSettings:
    """``order`` of the vocabulary and the wanted ``group_size`` S (None: sqrt V)."""

    order: str = "bpe"
    group_size: int | None = None


@dataclass
class HeadSettings:
    """One node of conf/head. ``partition`` and ``scorer`` describe a folded head and stay unread by the full one."""

    name: str = "full"
    tied: bool = True
    init_std: float = 0.02
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    scorer: str = "scale_shift"


def build_head(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding) -> Head:
    """The head that ``settings`` names; a tied head lends the rows of ``embedding`` [V, D].

    Raises UserError for a name or setting that no head has.
    """
    if settings.name not in BUILDERS:
        raise UserError(f"head.name is {settings.name!r}: choose one of {', '.join(BUILDERS)}")
    if settings.tied and embedding.num_embeddings != vocabulary_size:
        raise UserError(
            f"the embedding has {embedding.num_embeddings} rows for {vocabulary_size} tokens: use head.tied=false"
        )
    return BUILDERS[settings.name](settings, vocabulary_size, embedding)


def describe_head(settings: HeadSettings, head: Head) -> dict[str, Any]:
    """The columns of a result row that say which head was trained (empty where a head has no such thing)."""
    row: dict[str, Any] = {"head": settings.name, "tied": settings.tied}
    if isinstance(head, FoldedHead):
        row |= {
            "scorer": settings.scorer,
            "partition_order": settings.partition.order,
            "group_size": head.partition.num_slots,
            "num_groups": head.partition.num_groups,
        }
    return row


def _build_full(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding) -> Head:
    return FullHead(embedding.embedding_dim, vocabulary_size, _tied_weight(settings, embedding), settings.init_std)


def _build_grouped(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding) -> Head:
    if settings.partition.order not in ORDERS:
        raise UserError(f"head.partition.order is {settings.partition.order!r}: choose one of {', '.join(ORDERS)}")
    partition = equal_partition(vocabulary_size, settings.partition.group_size)
    scorer = _build_scorer(settings, partition, embedding)
    return FoldedHead(embedding.embedding_dim, partition, scorer, settings.init_std)


def _tied_weight(settings: HeadSettings, embedding: nn.Embedding) -> nn.Parameter | None:
    return cast(nn.Parameter, embedding.weight) if settings.tied else None


def _build_scorer(settings: HeadSettings, partition: Partition, embedding: nn.Embedding) -> TokenScorer:
    hidden_size = embedding.embedding_dim
    if settings.scorer == "scale_shift":
        if settings.tied:
            raise UserError(
                "scale_shift has no row for each token to tie: use head.tied=false or head.scorer=linear_looped"
            )
        return ScaleShiftScorer(hidden_size, partition, settings.init_std)
    if settings.scorer == "linear_looped":
        return LoopedLinearScorer(hidden_size, partition, _tied_weight(settings, embedding), settings.init_std)
    raise UserError(f"head.scorer is {settings.scorer!r}: choose one of {', '.join(SCORERS)}")


BUILDERS = {"full": _build_full, "grouped": _build_grouped}
