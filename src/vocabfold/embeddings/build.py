"""From settings to an embedding. The rest of the project asks for one here and never asks which one it got."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocabfold.embeddings.base import DenseEmbedding, TokenEmbedding, table_shape
from vocabfold.embeddings.low_rank import LowRankEmbedding
from vocabfold.embeddings.mixed import FREQUENT_SHARE, MixedEmbedding
from vocabfold.embeddings.quantized import QuantizedEmbedding
from vocabfold.embeddings.tensor_train import TensorTrainEmbedding
from vocabfold.embeddings.tt_matrix import TTMatrixEmbedding, rank_under
from vocabfold.embeddings.tt_svd import SAMPLE_ROWS, check_mode_sizes, search_shape
from vocabfold.errors import OutOfReach, UserError


@dataclass
class EmbeddingSettings:
    """One node of conf/embedding; a name reads its own keys only.

    ``mode_sizes`` and ``ranks`` (one between each two modes) are those of a tensor train, ``rank`` that of tt_matrix
    and low_rank; what is None is chosen under ``compression``, the fewest dense numbers for one kept. ``group_size``
    (columns with a scale, None: the row) belongs to the quantised ones, ``frequent_rows`` (the first rows, in 8 bits;
    None: a twelfth) to mixed.
    """

    name: str = "dense"
    mode_sizes: list[int] | None = None
    ranks: list[int] | None = None
    rank: int | None = None
    compression: float | None = None
    group_size: int | None = None
    frequent_rows: int | None = None


@dataclass(frozen=True)
class Method:
    """How settings become an embedding: what ``resolve`` leaves open for no one is enough to build it."""

    kind: type[TokenEmbedding]
    resolve: Callable[[EmbeddingSettings, Tensor], EmbeddingSettings]
    arguments: Callable[[EmbeddingSettings], dict[str, Any]]
    describe: Callable[[EmbeddingSettings], dict[str, Any]]


def resolve_settings(settings: EmbeddingSettings, weight: Tensor) -> EmbeddingSettings:
    """``settings`` with every size and rank chosen: for the table ``weight`` [V, D] where there is one to look at, for
    its shape alone where it is on the meta device. Raises UserError for a name or setting that no embedding has."""
    return _method(settings).resolve(settings, weight)


def build_embedding(settings: EmbeddingSettings, num_embeddings: int, embedding_dim: int) -> TokenEmbedding:
    """An embedding with fresh weights. Raises UserError for a name or setting that no embedding has."""
    method = _method(settings)
    resolved = method.resolve(settings, torch.empty(num_embeddings, embedding_dim, device="meta"))
    return method.kind(num_embeddings, embedding_dim, **method.arguments(resolved))


def compress_table(settings: EmbeddingSettings, weight: Tensor) -> TokenEmbedding:
    """The embedding that stands for the table ``weight`` [V, D]. Raises UserError as ``build_embedding``."""
    table_shape(weight)
    method = _method(settings)
    kind: Any = method.kind
    return kind.from_dense(weight, **method.arguments(method.resolve(settings, weight)))


def describe_embedding(settings: EmbeddingSettings, embedding: TokenEmbedding | None) -> dict[str, Any]:
    """The columns of a result row that say which embedding a run had; none without one."""
    if embedding is None:
        return {}
    shape = torch.empty(embedding.num_embeddings, embedding.embedding_dim, device="meta")
    method = _method(settings)
    return {
        "embedding": settings.name,
        **{f"embedding_{name}": value for name, value in method.describe(method.resolve(settings, shape)).items()},
        "embedding_compression": embedding.compression,
        "embedding_bytes": embedding.bytes_at_rest,
        "embedding_parameters": embedding.num_parameters,
    }


def _method(settings: EmbeddingSettings) -> Method:
    if settings.name not in METHODS:
        raise UserError(f"embedding.name is {settings.name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[settings.name]


def _checked_compression(settings: EmbeddingSettings, instead: str) -> float:
    if settings.compression is None:
        raise UserError(f"embedding={settings.name} needs a size: set embedding.compression or {instead}")
    if not settings.compression > 0:
        raise UserError(f"embedding.compression is {settings.compression}: choose more than 0")
    return settings.compression


def _resolve_tensor_train(settings: EmbeddingSettings, weight: Tensor) -> EmbeddingSettings:
    size = weight.shape[1]
    if settings.mode_sizes is not None:
        check_mode_sizes(settings.mode_sizes, size)
        if settings.ranks is not None:
            return settings
    elif settings.ranks is not None:
        raise UserError("embedding.ranks belong to embedding.mode_sizes: set both, or embedding.compression alone")
    compression = _checked_compression(settings, "embedding.mode_sizes and embedding.ranks")
    if weight.is_meta:  # Without a table the best shape is the best one for rows without structure.
        weight = torch.randn(SAMPLE_ROWS, size, generator=torch.Generator().manual_seed(0))
    mode_sizes, ranks = search_shape(weight, size / compression, settings.mode_sizes)
    return dataclasses.replace(settings, mode_sizes=mode_sizes, ranks=ranks, compression=None)


def _resolve_tt_matrix(settings: EmbeddingSettings, weight: Tensor) -> EmbeddingSettings:
    if settings.rank is not None:
        return settings
    compression = _checked_compression(settings, "embedding.rank")
    count, size = weight.shape
    rank = rank_under(count, size, weight.numel() / compression)
    return dataclasses.replace(settings, rank=rank, compression=None)


def _resolve_low_rank(settings: EmbeddingSettings, weight: Tensor) -> EmbeddingSettings:
    if settings.rank is not None:
        return settings
    compression = _checked_compression(settings, "embedding.rank")
    count, size = weight.shape
    rank = int(count * size / compression / (count + size))
    if rank < 1:
        raise OutOfReach(
            f"compression {compression:.4g} is out of reach of a low-rank table of {count} x {size}: "
            f"choose at most {count * size / (count + size):.1f}"
        )
    return dataclasses.replace(settings, rank=min(rank, size), compression=None)


def _resolve_mixed(settings: EmbeddingSettings, weight: Tensor) -> EmbeddingSettings:
    if settings.frequent_rows is not None:
        return settings
    return dataclasses.replace(settings, frequent_rows=max(1, round(FREQUENT_SHARE * len(weight))))


def _modes(settings: EmbeddingSettings) -> dict[str, str]:
    sizes, ranks = settings.mode_sizes or [], settings.ranks or []
    return {"mode_sizes": "x".join(map(str, sizes)), "ranks": ",".join(map(str, ranks))}


def _quantized(bits: int) -> Method:
    return Method(
        QuantizedEmbedding,
        lambda settings, weight: settings,
        lambda settings: {"bits": bits, "group_size": settings.group_size},
        lambda settings: {"group_size": settings.group_size},
    )


METHODS = {
    "dense": Method(DenseEmbedding, lambda settings, weight: settings, lambda settings: {}, lambda settings: {}),
    "tensor_train": Method(
        TensorTrainEmbedding,
        _resolve_tensor_train,
        lambda settings: {"mode_sizes": settings.mode_sizes, "ranks": settings.ranks},
        _modes,
    ),
    "tt_matrix": Method(
        TTMatrixEmbedding,
        _resolve_tt_matrix,
        lambda settings: {"rank": settings.rank},
        lambda settings: {"rank": settings.rank},
    ),
    "low_rank": Method(
        LowRankEmbedding,
        _resolve_low_rank,
        lambda settings: {"rank": settings.rank},
        lambda settings: {"rank": settings.rank},
    ),
    "int8": _quantized(8),
    "int4": _quantized(4),
    "mixed": Method(
        MixedEmbedding,
        _resolve_mixed,
        lambda settings: {"frequent_rows": settings.frequent_rows, "group_size": settings.group_size},
        lambda settings: {"frequent_rows": settings.frequent_rows, "group_size": settings.group_size},
    ),
}
