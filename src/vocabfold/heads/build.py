"""From settings to a head. The rest of the project asks for a head here and never asks which one it got."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads.adaptive import AdaptiveHead
from vocabfold.heads.base import Head
from vocabfold.heads.chunked import ChunkedHead
from vocabfold.heads.conditioned import ConditionedLinearScorer, ConditionOptions
from vocabfold.heads.folded import FoldedHead
from vocabfold.heads.full import FullHead
from vocabfold.heads.fused import FusedHead
from vocabfold.heads.linear import LoopedLinearScorer, SortedLinearScorer
from vocabfold.heads.loss_options import LossOptions
from vocabfold.heads.low_rank import LowRankScorer, SortedLowRankScorer
from vocabfold.heads.mixture import MixtureHead
from vocabfold.heads.nested import NestedFoldedHead
from vocabfold.heads.partition import (
    Partition,
)
from vocabfold.heads.readers import GroupReader, ResidualReader, WideReader
from vocabfold.heads.scorers import ScaleShiftScorer, SortedScaleShiftScorer, TokenScorer
from vocabfold.heads.settings import (
    BEST_GROUP_SCORER,
    BEST_ORDER,
    BEST_SCORER,
    GROUP_SCORERS,
    HeadSettings,
    PartitionSettings,
)
from vocabfold.heads.vocabulary_order import part_settings, vocabulary_order, wanted_partition
from vocabfold.tokens import TokenStream, token_counts

ScorerBuilder = Callable[[HeadSettings, Partition, nn.Embedding], TokenScorer]


def build_head(
    settings: HeadSettings,
    vocabulary_size: int,
    embedding: nn.Embedding,
    order: Tensor | None = None,
    counts: Tensor | None = None,
) -> Head:
    """The head that ``settings`` names; a tied head lends the rows of ``embedding`` [V, D].

    ``order`` [V], the token at each position of a partition, comes from ``vocabulary_order``; None stands in with token
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


def initial_std(settings: HeadSettings, hidden_size: int) -> float:
    """The standard deviation that fresh rows of a head are drawn with: as set or, where none is, that of torch's own
    Linear, 1 / sqrt(3 D), to one significant digit."""
    return float(f"{(3 * hidden_size) ** -0.5:.1g}") if settings.init_std is None else settings.init_std


def folded_head(
    hidden_size: int,
    vocabulary_size: int,
    tokens: TokenStream | None = None,
    *,
    tied_weight: Tensor | None = None,
    group_size: int | None = None,
    shortlist: int = 0,
) -> FoldedHead:
    """A folded head for a model of your own, where it had ``nn.Linear(hidden_size, vocabulary_size, bias=False)``: the
    best so far, as ``head=folded`` trains it (with the input embedding as ``tied_weight``), with every size by rule.

    ``tokens``, ids of the training text: groups are learned from its bigrams (seconds for a million tokens, see
    ``exchanged_order``), and biases start from its counts; without them groups are of tokens that follow each other and
    biases start as 0, which costs quality.
    ``tied_weight`` [V, D] lends the tokens' rows. ``group_size`` (None: about sqrt V) and ``shortlist``, how many of
    the most frequent tokens have a group to themselves: see ``equal_partition``. Raises UserError for sizes that no
    partition has.
    """
    if tokens is None and shortlist:
        raise UserError("a shortlist holds the most frequent tokens: give the tokens of the training text too")
    partition = PartitionSettings("bpe" if tokens is None else BEST_ORDER, group_size, shortlist)
    settings = HeadSettings(
        type="folded",
        tied=tied_weight is not None,
        init_std=None,
        partition=partition,
        scorer=BEST_SCORER,
        group_scorer=BEST_GROUP_SCORER,
        count_biases=True,
    )
    order = vocabulary_order(settings, vocabulary_size, np.empty(0, dtype=np.int64) if tokens is None else tokens)
    num_rows = vocabulary_size if tied_weight is None else len(tied_weight)
    rows = nn.Embedding(num_rows, hidden_size, device="meta")  # none of its own, but for those lent
    if tied_weight is not None:
        rows.weight = cast(nn.Parameter, tied_weight)
    counts = None if tokens is None else token_counts(tokens, vocabulary_size)
    return cast(FoldedHead, build_head(settings, vocabulary_size, rows, order, counts))


def _build_full(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, _: Tensor | None) -> Head:
    return FullHead(
        embedding.embedding_dim,
        vocabulary_size,
        _tied_weight(settings, embedding),
        initial_std(settings, embedding.embedding_dim),
        settings.softcap,
        settings.count_biases,
    )


def _build_chunked(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, _: Tensor | None) -> Head:
    if settings.softcap is not None:
        raise UserError("head=chunked cannot cap its logits, which torch computes: use head=full, or head.softcap=null")
    return ChunkedHead(
        embedding.embedding_dim,
        vocabulary_size,
        _tied_weight(settings, embedding),
        initial_std(settings, embedding.embedding_dim),
        settings.chunk_rows,
        settings.count_biases,
    )


def _build_fused(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, _: Tensor | None) -> Head:
    return FusedHead(
        embedding.embedding_dim,
        vocabulary_size,
        _tied_weight(settings, embedding),
        initial_std(settings, embedding.embedding_dim),
        settings.softcap,
        settings.kernel,
        settings.count_biases,
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
    partition = wanted_partition(settings.partition, vocabulary_size, order)
    if settings.scorer not in SCORERS:
        raise UserError(f"head.scorer is {settings.scorer!r}: choose one of {', '.join(SCORERS)}")
    scorer = SCORERS[settings.scorer](settings, partition, embedding)
    return OF_SYMBOLS[settings.partition.symbols](
        embedding.embedding_dim,
        partition,
        scorer,
        initial_std(settings, embedding.embedding_dim),
        settings.softcap,
        settings.count_biases,
        _group_reader(settings, embedding.embedding_dim),
    )


def _build_mixture(settings: HeadSettings, vocabulary_size: int, embedding: nn.Embedding, order: Tensor | None) -> Head:
    parts = []
    for index in range(len(settings.mixture)):
        part_order = None if order is None else order[index].clone()  # weights that are views cannot be saved
        part = _build_folded(part_settings(settings, index), vocabulary_size, embedding, part_order)
        assert isinstance(part, FoldedHead)
        parts.append(part)
    return MixtureHead(parts)


def _group_reader(settings: HeadSettings, hidden_size: int) -> GroupReader | None:
    kind = settings.group_scorer
    if kind not in GROUP_SCORERS:
        raise UserError(f"head.group_scorer is {kind!r}: choose one of {', '.join(GROUP_SCORERS)}")
    if kind == "shared" and settings.scorer != "linear_conditioned":
        raise UserError("head.group_scorer=shared shares the network of head.scorer=linear_conditioned: use residual")
    if kind != "linear" and settings.partition.symbols == 3:
        raise UserError("with head.partition.symbols=3 groups are scored as tokens are: use head.group_scorer=linear")
    return READERS[kind](hidden_size, settings.group_width) if kind in READERS else None


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
        ConditionOptions(
            scale=settings.condition_scale,
            std=settings.condition_std,
            gated=settings.condition_gated,
            detached=settings.condition_detached,
            shared=settings.group_scorer == "shared",
        ),
    )


def _refuse_tied(settings: HeadSettings) -> None:
    if settings.tied:
        raise UserError(
            f"{settings.scorer} has no row for each token to tie: use head.tied=false or head.scorer=linear_sorted"
        )


READERS: dict[str, type[GroupReader]] = {"residual": ResidualReader, "wide": WideReader}
BUILDERS = {
    "full": _build_full,
    "folded": _build_folded,
    "chunked": _build_chunked,
    "adaptive": _build_adaptive,
    "fused": _build_fused,
    "mixture": _build_mixture,
}
OF_SYMBOLS = {2: FoldedHead, 3: NestedFoldedHead}
SCORERS: dict[str, ScorerBuilder] = {
    "scale_shift": _scale_shift(ScaleShiftScorer),
    "scale_shift_sorted": _scale_shift(SortedScaleShiftScorer),
    "linear_looped": _linear(LoopedLinearScorer),
    "linear_sorted": _linear(SortedLinearScorer),
    "linear_conditioned": _conditioned,
    "low_rank": _low_rank(LowRankScorer),
    "low_rank_sorted": _low_rank(SortedLowRankScorer),
}
