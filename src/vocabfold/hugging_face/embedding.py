"""A finished model's input embedding in fewer bytes, by the kinds of ``vocabfold.embeddings``.

Where the output layer shares its rows with the input embedding (a tied model), only the input side changes: the output
layer keeps the rows as they were, so such a model becomes smaller only where ``outputs`` follow too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from vocabfold.embeddings import EmbeddingSettings, TokenEmbedding, compress_table
from vocabfold.errors import UserError
from vocabfold.hugging_face.models import backbone

GROUP_SIZES = (64, 32, 16)  # columns with a scale of their own in 4 bits: the first that divides D, if nothing is asked
OPTIONS = tuple(field.name for field in dataclasses.fields(EmbeddingSettings) if field.name != "name")
ROWS_AT_A_TIME = 2048
PROBED_ROWS = 4


class CompressedInput(nn.Module):
    """Takes the place of a model's input embedding: the vectors of ``embedding`` times ``scale``, in ``dtype``."""

    def __init__(self, embedding: TokenEmbedding, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding, self.scale, self.dtype = embedding, scale, dtype
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` [..] -> [.., D]."""
        vectors: Tensor = self.embedding(ids).to(self.dtype)
        return vectors if self.scale == 1 else vectors * self.scale


@torch.no_grad()
def compress_embedding(model: Any, method: str = "int4", outputs: bool = False, **options: Any) -> TokenEmbedding:
    """Replace the input embedding of ``model`` in place; what is returned tells its bytes and compression.

    ``method`` and ``options`` as ``EmbeddingSettings``: ``"int4"``, which on a real model keeps the perplexity within
    1.01 at the greatest compression (real_embedding.md), ``"mixed"`` (the first twelfth of the tokens in 8 bits, the
    others in 4), ``"int8"``, ``"low_rank"``, ``"tt_matrix"`` or ``"tensor_train"``, the last three with
    ``compression=`` or their ranks. Groups have 64 columns in 4 bits where these divide D, else 32 or 16. With
    ``outputs`` the output layer of a tied model takes the same rounded rows, at full size: what quality would be if it
    read the compressed table too. ``save_pretrained`` is refused afterwards: compress again after loading. Raises
    UserError, one line, for a model that is not a causal language model with a plain input embedding, and for a
    method, option or compression that does not exist.
    """
    base = backbone(model)
    name = type(model).__name__
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise UserError(f"compress_embedding has no option {unknown[0]!r}: choose from {', '.join(OPTIONS)}")
    layer, scale = input_layer(model)
    head = model.get_output_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is layer.weight
    if outputs and not is_tied:
        raise UserError(f"{name} has output rows of its own, which no embedding stands for: leave out outputs")
    if method in ("int4", "mixed"):
        options.setdefault("group_size", next((size for size in GROUP_SIZES if layer.embedding_dim % size == 0), None))
    table = layer.weight.detach()
    embedding = compress_table(EmbeddingSettings(name=method, **options), table.float())
    embedding.prepare_for_inference()
    embedding.requires_grad_(False)
    if outputs:
        table.copy_(rows_of(embedding))
    if is_tied or model.config.tie_word_embeddings:  # of a folded model the head has the rows
        # From here on these are two tables: nobody may tie them again.
        for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        for module in model.modules():
            if getattr(module, "all_tied_weights_keys", None):
                module.all_tied_weights_keys = {}
    set_input_embeddings: Any = base.set_input_embeddings
    set_input_embeddings(CompressedInput(embedding, scale, table.dtype))
    model.save_pretrained = _refuse_to_save
    return embedding


def rows_of(embedding: TokenEmbedding) -> Tensor:
    """All vectors [V, D], float32, a few rows at a time."""
    starts = range(0, embedding.num_embeddings, ROWS_AT_A_TIME)
    stops = (min(start + ROWS_AT_A_TIME, embedding.num_embeddings) for start in starts)
    return torch.cat([embedding.rows(start, stop).float() for start, stop in zip(starts, stops, strict=True)])


def input_layer(model: Any) -> tuple[nn.Embedding, float]:
    """(the model's input embedding, the number that its rows are multiplied with). Raises UserError for another kind
    of layer."""
    name = type(model).__name__
    layer = model.get_input_embeddings()
    if isinstance(layer, CompressedInput):
        raise UserError(f"the embedding of {name} is compressed already: load the model again")
    if not isinstance(layer, nn.Embedding) or type(layer.weight) is not nn.Parameter or layer.weight.is_meta:
        raise UserError(f"{name} has a quantised or sharded input embedding, or one of its own kind: load it whole")
    if not layer.weight.is_floating_point():
        raise UserError(f"{name} has an input embedding of {layer.weight.dtype}: load it in floating point")
    scale = float(getattr(layer, "embed_scale", 1.0))  # Gemma multiplies by the square root of D
    ids = torch.arange(min(PROBED_ROWS, layer.num_embeddings), device=layer.weight.device)
    if layer.max_norm is not None or not torch.allclose(layer(ids).float(), layer.weight[ids].float() * scale, 1e-2):
        raise UserError(f"the input embedding of {name} does more than look up and scale its rows")
    return layer, scale


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise UserError("a model with a compressed embedding is not saved: save it before, and compress after loading")
