"""A model's own output layer as a head of this library, checked to say what the model says."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from vocabfold.heads.full import FullHead
from vocabfold.heads.loss_options import soft_cap
from vocabfold.hugging_face.models import backbone, check_logits, output_layer, softcap_of


def full_head(model: Any, use: str, with_adapters: bool = False) -> FullHead:
    """The output layer of a causal language model as a FullHead that shares its rows, bias and softcap.

    ``use``: what it is for, a verb; ``with_adapters`` as in ``backbone``. Raises UserError, one line, for a model that
    is not a causal language model with a plain output layer, and where its logits are anything else than that layer's
    of its last hidden states.
    """
    base = backbone(model, with_adapters)
    layer, cap = output_layer(model, use), softcap_of(model)
    check_logits(model, base, lambda hidden: soft_cap(F.linear(hidden, layer.weight, layer.bias), cap))
    vocabulary_size, hidden_size = layer.weight.shape
    head = FullHead(hidden_size, vocabulary_size, layer.weight, softcap=cap)  # type: ignore[arg-type]
    head.bias = layer.bias
    return head
