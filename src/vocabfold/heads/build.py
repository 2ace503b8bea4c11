"""From settings to a head. The rest of the project asks for a head here and never asks which one it got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads.adaptive import AdaptiveHead
from vocabfold.heads.base import Head
from vocabfold.heads.chunked import ChunkedHead
from vocabfold.heads.conditioned import ConditionedLinearScorer
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead
from vocabfold.heads.fused import FusedHead
from vocabfold.heads.linear import LoopedLinearScorer, SortedLinearScorer
from vocabfold.heads.loss_options import LossOptions
from vocabfold.heads.low_rank import LowRankScorer, SortedLowRankScorer
from vocabfold.heads.orders import (
    TokenStream,
    clustered_order,
    cooccurrence_embedding,
    frequency_order,
    random_order,
    token_counts,
)
from vocabfold.heads.partition import Partition, equal_boundaries, equal_partition
from vocabfold.heads.scorers import ScaleShiftScorer, SortedScaleShiftScorer, TokenScorer
from vocabfold.runs.checkpoint import WEIGHTS_NAME


@dataclass
class PartitionSettings:
    """``order`` of the vocabulary and the sizes of its groups: ``shortlist`` K groups of one token, then equal groups
    with the wanted ``group_size`` S (None: the root of the number of tokens in them).

    ``seed`` decides the random order. ``clustered_from``: the folder of a trained run whose input embedding is
    clustered; None clusters tokens by their neighbours in the training stream.
    """

    order: str = "bpe"
    group_size: int | None = None
    shortlist: int = 0
    seed: int = 0
    clustered_from: str | None = field(default=None, metadata={"folder": True})


@dataclass
class HeadSettings:
    """One node of conf/head. ``type``, one of BUILDERS, is the class that builds it; ``name`` is what it is called, and
    decides nothing. ``init_std`` None: that of torch's own Linear, see ``initial_std``. ``label_smoothing`` and ``z_loss`` are LossOptions of training, ``softcap`` bounds the
    logits; each is for every head that does not refuse it, and 0 or None is off. ``count_biases`` gives full and
    folded heads biases that start from the tokens' counts in the training stream. ``condition_width`` is that of
    linear_conditioned (None: see conditioned.default_width).

    ``partition``, ``scorer`` and ``rank`` (of low_rank's correction) describe a folded head, ``chunk_rows`` the
    chunked, ``cutoffs`` and ``div_value`` the adaptive and ``kernel`` the fused one; the others leave them unread.
    """

    name: str = "full"
    type: str = "full"
    tied: bool = True
    init_std: float | None = 0.02
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    scorer: str = "scale_shift"
    rank: int = 4
    chunk_rows: int = 512
    cutoffs: list[int] = field(default_factory=lambda: [2000, 10_000])
    div_value: float = 4.0
    kernel: str = "cce"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    count_biases: bool = False
    condition_width: int | None = None


ScorerBuilder = Callable[[HeadSettings, Partition, nn.Embedding], TokenScorer]


def build_head(
    settings: HeadSettings,
    vocabulary_size: int,
    embedding: nn.Embedding,
    order: Tensor | None = None,
    counts: Tensor | None = None,
) -> Head:
    """The head that ``settings`` names; a tied head lends the rows of ``embedding`` [V, D].

    ``order`` [V], the token at each position of a partition, comes from ``token_order``; None stands in with token
    order, as for a head whose weights, and with them its order, are loaded next. ``counts`` [V] of the tokens in the
    training stream start the biases that ``settings.count_biases`` asks for; None leaves them at 0, to be loaded.
    Raises UserError for a name or setting that no head has.
    """
    if settings.type not in BUILDERS:
        raise UserError(f"head.type is {settings.type!r}: choose one of {', '.join(BUILDERS)}")
    if settings.tied and embedding.num_embeddings != vocabulary_size:
        raise UserError(
            f"the embedding has {embedding.num_embeddings} rows for {vocabulary_size} tokens: use head.tied=false"
        )
    head = BUILDERS[settings.type](settings, vocabulary_size, embedding, order)
    head.training_options = LossOptions(settings.label_smoothing, settings.z_loss)
    if settings.count_biases and counts is not None:
        head.start_from_counts(counts)
    return head


def token_order(settings: HeadSettings, vocabulary_size: int, tokens: TokenStream) -> Tensor | None:
    """The order [V] that ``settings`` ask for, counted on the training stream ``tokens`` where it depends on it; None
    for a head without a partition. Raises UserError for an order or sizes that no partition has, or where the run to
    cluster from cannot be read."""
    partition = settings.partition
    if settings.type == "adaptive":
        return frequency_order(token_counts(tokens, vocabulary_size))
    if settings.type != "folded":
        return None
    _check_order(partition)
    if partition.order == "bpe":
        return torch.arange(vocabulary_size)
    if partition.order == "random":
        return random_order(vocabulary_size, partition.seed)
    counts = token_counts(tokens, vocabulary_size)
    if partition.order == "frequency":
        return frequency_order(counts)
    boundaries = equal_boundaries(vocabulary_size, partition.group_size, partition.shortlist)
    if partition.clustered_from is None:
        embedding = cooccurrence_embedding(tokens, vocabulary_size, counts)
    else:
        embedding = saved_embedding(Path(partition.clustered_from), vocabulary_size)
    return clustered_order(embedding, boundaries, frequency_order(counts)[: partition.shortlist], counts > 0)


def describe_head(settings: HeadSettings, head: Head) -> dict[str, Any]:
    """The columns of a result row that say which head was trained (empty where a head has no such thing)."""
    row: dict[str, Any] = {"head": settings.name, "tied": settings.tied}
    row |= head.described(settings)
    return row | {name: value for name in EXTRAS if (value := getattr(settings, name))}


def initial_std(settings: HeadSettings, hidden_size: int) -> float:
    """The standard deviation that fresh rows of a head are drawn with: as set or, where none is, that of torch's own
    Linear, 1 / sqrt(3 D), to one significant digit."""
    return float(f"{(3 * hidden_size) ** -0.5:.1g}") if settings.init_std is None else settings.init_std


def saved_embedding(folder: Path, vocabulary_size: int) -> Tensor:
    """The input embedding [V, D] of a finished run. Raises UserError where there is none of this vocabulary."""
    path = folder / WEIGHTS_NAME
    try:
        with safetensors.safe_open(path, framework="pt") as weights:
            kept = {name for name in weights.keys() if name.startswith("backbone.token_embedding.")}  # noqa: SIM118
            if kept - {"backbone.token_embedding.weight"}:
                raise UserError(f"{path} holds a compressed input embedding: name a run with embedding=dense")
            # safetensors keeps one name of a tied weight, and which one is its own choice.
            for name in ("backbone.token_embedding.weight", "head.weight", "head.scorer.weight"):
                if name in weights.keys():  # noqa: SIM118 (the reader is no mapping)
                    embedding: Tensor = weights.get_tensor(name)
                    break
            else:
                raise UserError(f"{path} holds no input embedding: name the folder of a language model's run")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"head.partition.clustered_from={folder}: {path.name} cannot be read ({error})") from error
    if len(embedding) != vocabulary_size:
        raise UserError(
            f"{path} was trained on {len(embedding)} tokens, this corpus has {vocabulary_size}: "
            "name a run with the same tokenizer"
        )
    return embedding


def _check_order(partition: PartitionSettings) -> None:
    if partition.order not in ORDERS:
        raise UserError(f"head.partition.order is {partition.order!r}: choose one of {', '.join(ORDERS)}")


def _build_full(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, _: Tensor | None) -> Head:
    weight = _tied_weight(settings, embedding)
    return FullHead(
        embedding.embedding_dim,
        vocabulary_size,
        weight,
        initial_std(settings, embedding.embedding_dim),
        settings.softcap,
        settings.count_biases,
    )


def _build_chunked(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, _: Tensor | None) -> Head:
    if settings.softcap is not None:
        raise UserError("head=chunked cannot cap its logits, which torch computes: use head=full, or head.softcap=null")
    weight = _tied_weight(settings, embedding)
    return ChunkedHead(
        embedding.embedding_dim,
        vocabulary_size,
        weight,
        initial_std(settings, embedding.embedding_dim),
        settings.chunk_rows,
    )


def _build_fused(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, _: Tensor | None) -> Head:
    weight = _tied_weight(settings, embedding)
    return FusedHead(
        embedding.embedding_dim,
        vocabulary_size,
        weight,
        initial_std(settings, embedding.embedding_dim),
        settings.softcap,
        settings.kernel,
    )


def _build_adaptive(
    settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, order: Tensor | None
) -> Head:
    if settings.tied:
        raise UserError("head=adaptive has rows of several widths, none to tie: use head.tied=false")
    return AdaptiveHead(
        embedding.embedding_dim, vocabulary_size, settings.cutoffs, settings.div_value, order, settings.softcap
    )


def _build_folded(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, order: Tensor | None) -> Head:
    _check_order(settings.partition)
    partition = equal_partition(
        vocabulary_size, settings.partition.group_size, order, shortlist=settings.partition.shortlist
    )
    if settings.scorer not in SCORERS:
        raise UserError(f"head.scorer is {settings.scorer!r}: choose one of {', '.join(SCORERS)}")
    scorer = SCORERS[settings.scorer](settings, partition, embedding)
    return FoldedHead(
        embedding.embedding_dim,
        partition,
        scorer,
        initial_std(settings, embedding.embedding_dim),
        settings.softcap,
        settings.count_biases,
    )


def _tied_weight(settings: HeadSettings, embedding: nn.Embedding) -> nn.Parameter | None:
    if not settings.tied:
        return None
    if not isinstance(embedding, nn.Embedding):  # a dense one is one
        raise UserError(
            "a compressed embedding has no rows to lend to the head: use head.tied=false or embedding=dense"
        )
    return cast(nn.Parameter, embedding.weight)


def _scale_shift(kind: type[ScaleShiftScorer]) -> ScorerBuilder:
    def build(settings: HeadSettings, partition: Partition, embedding: nn.Embedding) -> TokenScorer:
        _refuse_tied(settings)
        return kind(embedding.embedding_dim, partition, initial_std(settings, embedding.embedding_dim))

    return build


def _low_rank(kind: type[LowRankScorer]) -> ScorerBuilder:
    def build(settings: HeadSettings, partition: Partition, embedding: nn.Embedding) -> TokenScorer:
        _refuse_tied(settings)
        return kind(embedding.embedding_dim, partition, settings.rank, initial_std(settings, embedding.embedding_dim))

    return build


def _linear(kind: type[LoopedLinearScorer]) -> ScorerBuilder:
    def build(settings: HeadSettings, partition: Partition, embedding: nn.Embedding) -> TokenScorer:
        return kind(
            embedding.embedding_dim,
            partition,
            _tied_weight(settings, embedding),
            initial_std(settings, embedding.embedding_dim),
        )

    return build


def _conditioned(settings: HeadSettings, partition: Partition, embedding: nn.Embedding) -> TokenScorer:
    weight = _tied_weight(settings, embedding)
    return ConditionedLinearScorer(
        embedding.embedding_dim,
        partition,
        settings.condition_width,
        weight,
        initial_std(settings, embedding.embedding_dim),
    )


def _refuse_tied(settings: HeadSettings) -> None:
    if settings.tied:
        raise UserError(
            f"{settings.scorer} has no row for each token to tie: use head.tied=false or head.scorer=linear_sorted"
        )


BUILDERS = {
    "full": _build_full,
    "folded": _build_folded,
    "chunked": _build_chunked,
    "adaptive": _build_adaptive,
    "fused": _build_fused,
}
EXTRAS = ("label_smoothing", "z_loss", "softcap")  # settings that any head may have; off, they change nothing
ORDERS = ("bpe", "frequency", "random", "clustered")
SCORERS: dict[str, ScorerBuilder] = {
    "scale_shift": _scale_shift(ScaleShiftScorer),
    "scale_shift_sorted": _scale_shift(SortedScaleShiftScorer),
    "linear_looped": _linear(LoopedLinearScorer),
    "linear_sorted": _linear(SortedLinearScorer),
    "linear_conditioned": _conditioned,
    "low_rank": _low_rank(LowRankScorer),
    "low_rank_sorted": _low_rank(SortedLowRankScorer),
}
